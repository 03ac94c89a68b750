"""Every loss is one argument of `attach_kd`, between models of any kind, and leaves no trace."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from kdlayers import (
    AEKTLoss,
    BinaryKDLoss,
    ChannelWiseLoss,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    KDLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    attach_kd,
)
from tests.nets import Net, batch

IMAGES, LABELS = batch(6, pixels=16)


def vit(width):
    return VisionTransformer(16, 4, num_classes=3, embed_dim=width, depth=2, num_heads=2)


MODELS = {"cnn": (partial(Net, stride=2), "last"), "transformer": (vit, "blocks.1")}
ON_LOGITS = {
    "KD": KDLoss,
    "standardised KD": partial(KDLoss, standardize=True),
    "standardised DKD": partial(DKDLoss, standardize=True),
    "standardised AEKT": partial(AEKTLoss, standardize=True),
    "DIST": DISTLoss,
    "binary": BinaryKDLoss,
}
ON_FEATURES = {
    "cosine": FeatureLoss,
    "mse": partial(FeatureLoss, distance="mse", normalize_teacher=True),
    "pooled": partial(FeatureLoss, distance="smooth_l1", projector="mlp", tokens="pooled"),
    "FitNet": FitNetLoss,
    "RKD": RKDLoss,
    "similarity": SimilarityPreservingLoss,
    "channels": ChannelWiseLoss,
}


@pytest.mark.parametrize("loss", [*ON_LOGITS, *ON_FEATURES])
@pytest.mark.parametrize("theirs", MODELS)
@pytest.mark.parametrize("ours", MODELS)
def test_one_argument(ours, theirs, loss):
    torch.manual_seed(0)
    (make, point), (make_teacher, tap) = MODELS[ours], MODELS[theirs]
    student, teacher = make(8), make_teacher(12)
    made = ON_FEATURES[loss](at=(point, tap)) if loss in ON_FEATURES else ON_LOGITS[loss]()

    kd = attach_kd(student, teacher, losses=[made], example=IMAGES)
    value = F.cross_entropy(student.train()(IMAGES), LABELS) + kd.loss(LABELS)
    value.backward()

    assert value.isfinite()
    for parameter in kd.parameters():
        assert parameter.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())
    kd.remove()
    again = make(8)
    again.load_state_dict(student.state_dict())  # strictly: not a key more or less
    assert torch.equal(again.eval()(IMAGES), student.eval()(IMAGES))
