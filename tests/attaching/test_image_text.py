"""Students that take a text beside the images, and return embeddings, as CLIP does."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import FeatureLoss, KDLoss, RKDLoss, attach_kd
from kdlayers.errors import ArgumentError, KDLayersWarning
from tests.nets import Net, batch

IMAGES, LABELS = batch()
TEXTS = torch.arange(12).reshape(6, 2)


class Pairs(nn.Module):
    """The text comes first, as in transformers' CLIPModel."""

    def __init__(self, channels):
        super().__init__()
        self.visual = Net(channels, classes=4)
        self.words = nn.Embedding(12, 4)
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, input_ids, pixel_values):
        images = F.normalize(self.visual(pixel_values), dim=-1)
        texts = F.normalize(self.words(input_ids).mean(1), dim=-1)
        return images, texts, self.scale.exp()


@pytest.mark.parametrize("way", ["positional", "keywords"])
def test_the_transform_converts_the_images_wherever_they_are(way):
    student, teacher = Pairs(4), Pairs(6)
    loss = FeatureLoss(projector=None, distance="mse")
    halved = {"teacher_transform": lambda images: images / 2}
    kd = attach_kd(student, teacher, losses=[loss], example=(TEXTS, IMAGES), **halved)
    keywords = {"input_ids": TEXTS, "pixel_values": IMAGES}
    out = student(**keywords) if way == "keywords" else student(TEXTS, IMAGES)
    expected = F.mse_loss(out[0], teacher.eval()(TEXTS, IMAGES / 2)[0])
    torch.testing.assert_close(kd.loss(), expected)


def test_a_teacher_of_images_names_the_way_to_attach():
    student, teacher = Pairs(4), Net(6, classes=4)
    with pytest.raises(ArgumentError, match=r"attach to its part that takes images, such as stu"):
        attach_kd(student, teacher, losses=[FeatureLoss()], example=(TEXTS, IMAGES))
    kd = attach_kd(student.visual, teacher, losses=[FeatureLoss()], example=IMAGES)
    images, texts, scale = student(TEXTS, IMAGES)
    (kd.loss() + (scale * images @ texts.T).mean()).backward()
    assert student.words.weight.grad.any()
    assert student.visual.stem[0].weight.grad.any()


def test_unit_vectors_are_no_logits():
    student, teacher = Pairs(4), Pairs(6)
    given = {"example": (TEXTS, IMAGES)}
    with pytest.warns(KDLayersWarning, match=r"student \(Pairs\) as logits, .*FeatureLoss"):
        attach_kd(student, teacher, losses=[KDLoss()], **given).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_kd(student, teacher, losses=[FeatureLoss(), RKDLoss()], **given).remove()
        parts = student.visual, teacher.visual
        attach_kd(*parts, losses=[KDLoss()], example=IMAGES).remove()
