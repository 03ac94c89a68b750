"""Segmentation and detection: outputs in dicts, backbones inside detectors, points in pyramids."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18, segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

from kdlayers import (
    AEKTLoss,
    AttentionTransferLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DISTLoss,
    DKDLoss,
    FitNetLoss,
    KDLoss,
    KDPoint,
    MutualLoss,
    StudentFriendlyKDLoss,
    attach_kd,
    bake,
    load_student,
    save_student,
)
from kdlayers import functional as kdf
from kdlayers.errors import ArgumentError, NoMatchError, ShapeError
from tests.attach_tester import AttachCase, flat
from tests.nets import Net, batch

PLAIN = {"weights": None, "weights_backbone": None, "num_classes": 5}
FPN = {"weights": None, "trainable_layers": 5, "norm_layer": nn.BatchNorm2d}


def fpn():
    return resnet_fpn_backbone(backbone_name="resnet18", **FPN)


def trunk():
    return IntermediateLayerGetter(resnet18(), {"layer3": "fine", "layer4": "coarse"})


def mobile():
    return mobilenet_backbone(
        **{**FPN, "trainable_layers": 6}, backbone_name="mobilenet_v3_large", fpn=True
    )


lraspp = partial(segmentation.lraspp_mobilenet_v3_large, **PLAIN)
deeplab = partial(segmentation.deeplabv3_mobilenet_v3_large, **PLAIN)

CASES = {
    "trunk": AttachCase(trunk, fpn, {"layer4.0": "body.layer3", "layer4": "body.layer4"}),
    "fpn": AttachCase(fpn, mobile, {"body.layer4": "body", "fpn": "fpn"}),
    "lraspp": AttachCase(lraspp, deeplab, {"backbone.15": "backbone.15", "backbone": "backbone"}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attach(case, tmp_path):
    case.run(tmp_path)


@pytest.mark.parametrize("make", [trunk, fpn, lraspp])
def test_baked_and_exported_models_keep_their_dicts(make):
    student, images = make().eval(), torch.randn(2, 3, 64, 64)
    kd = attach_kd(student, at=[KDPoint(last_point(student), num_templates=4)], example=images)
    expected = student(images)
    kd.detach()
    baked = bake(student)
    exported = [torch.export.export(model, (images,)).module() for model in (student, baked)]
    for model in (baked, copy.deepcopy(student), *exported):
        found = model(images)
        assert list(found) == list(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value)


def last_point(student):
    names = [name for name, _ in student.named_children()]
    return {"layer4": "layer4", "fpn": "fpn", "classifier": "backbone"}[names[-1]]


def test_all_levels_of_a_pyramid_are_kept_and_the_finest_gets_the_layer():
    student, images = fpn().eval(), torch.randn(2, 3, 64, 64)
    before = student(images)
    kd = attach_kd(student, at=[KDPoint("fpn", num_templates=4)], example=images)
    after = student(images)
    assert list(after) == list(before) == ["0", "1", "2", "3", "pool"]
    assert not torch.equal(after["0"], before["0"])
    assert all(torch.equal(after[key], before[key]) for key in ("1", "2", "3", "pool"))
    kd.remove()


ON_LOGITS = [DKDLoss(), AEKTLoss(), MutualLoss(), StudentFriendlyKDLoss(), DISTLoss()]


@pytest.mark.parametrize("loss", ON_LOGITS, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("make", [fpn, lraspp])
def test_losses_on_logits_are_refused_with_what_to_use_instead(make, loss):
    student, images = make(), torch.zeros(2, 3, 64, 64)
    advice = "would get maps .* use KDLoss or ChannelWiseLoss for|which of them are the logits"
    with pytest.raises((ShapeError, ArgumentError), match=advice):
        attach_kd(student, make(), losses=[copy.deepcopy(loss)], example=images)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_class_maps_are_compared_pixel_by_pixel():
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(5, (4, 64, 64))
    labels[:, :10] = 255
    student, teacher = lraspp(), deeplab()
    losses = [KDLoss(ignore_index=255), ChannelWiseLoss(), KDLoss(at="classifier", name="low")]
    with pytest.raises(NoMatchError, match="'classifier'"):
        attach_kd(student, nn.Sequential(deeplab()), losses=losses, example=images)
    kd = attach_kd(student, teacher, losses=losses, example=images)
    logits = student.train()(images)["out"]
    loss = F.cross_entropy(logits, labels, ignore_index=255) + kd.loss(labels)
    with torch.no_grad():
        expected = teacher.eval()(images)["out"]
    values = kdf.kd(logits, expected, reduction="none").detach()
    torch.testing.assert_close(kd.terms["KDLoss"], values[:, 10:].mean())
    found = kdf.channelwise(logits, expected).detach()
    torch.testing.assert_close(kd.terms["ChannelWiseLoss"], found)
    assert kd.terms["low"] > 0
    loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_class_maps_of_other_classes_are_refused_before_training():
    images = torch.zeros(2, 3, 64, 64)
    teacher = segmentation.lraspp_mobilenet_v3_large(**{**PLAIN, "num_classes": 4})
    with pytest.raises(ShapeError, match=r"same images and classes, got \[2, 5, 64, 64\] and"):
        attach_kd(lraspp(), teacher, losses=[KDLoss()], example=images)


def test_other_classes_are_refused_before_training():
    with pytest.raises(ShapeError, match=r"the student's are \[6, 5\] and the teacher's \[6, 3\]"):
        attach_kd(Net(4, classes=5), Net(6), losses=[KDLoss()], example=batch()[0])


@pytest.mark.parametrize("make", [KDLoss, partial(DKDLoss, beta=1.0), AEKTLoss, MutualLoss])
def test_losses_on_logits_of_an_auxiliary_classifier(make):
    images, labels = batch()
    student, teacher = Net(4).train(), Net(6).eval()
    torch.manual_seed(1)
    kd = attach_kd(student, teacher, losses=[make(at="head")], example=images)
    logits = student(images)
    value = kd.loss(labels)
    torch.testing.assert_close(value, make()(logits, teacher(images), labels))


def test_decisions_without_the_number_of_classes_are_an_error():
    images = torch.zeros(2, 3, 64, 64)
    with pytest.raises(ArgumentError, match=r"pass DecisionTargets\(num_classes=...\)"):
        attach_kd(lraspp(), lraspp(), ["backbone.12", "backbone.16"], example=images)


def test_a_segmentation_step_with_labels_of_pixels():
    """Codebooks and losses on features need no labels, so those of pixels may be passed."""
    images, labels = torch.randn(4, 3, 64, 64), torch.randint(5, (4, 64, 64))
    student, teacher = lraspp(), deeplab()
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("backbone", "backbone", targets=CodebookTargets(4))],
        losses=[AttentionTransferLoss(at=("backbone.12", "backbone.12"))],
        example=images,
    )
    kd.fit([(images, labels)])
    student.train()
    loss = F.cross_entropy(student(images)["out"], labels) + kd.loss(labels)
    loss.backward()
    assert all(p.grad is not None for n, p in student.named_parameters() if ".kd." in n)


def detector():
    sizes = ((32,), (64,), (128,), (256,), (512,))
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(fpn(), 5, min_size=64, max_size=64, rpn_anchor_generator=anchors)


PICTURES = [torch.rand(3, 64, 64), torch.rand(3, 48, 64)]
BOXES = [{"boxes": torch.tensor([[5.0, 5, 40, 40]]), "labels": torch.tensor([2])} for _ in "ab"]


def attached_detector():
    student, teacher = detector(), detector()
    images = student.transform(PICTURES)[0].tensors
    kd = attach_kd(
        student.backbone,
        teacher.backbone,
        [KDPoint("body.layer4", targets=CodebookTargets(4))],
        losses=[FitNetLoss(at="fpn")],
        example=images,
    )
    kd.fit([images])
    return student.train(), teacher, kd


def test_a_backbone_inside_a_detector_that_runs_as_a_whole(tmp_path):
    student, _, kd = attached_detector()
    optimiser = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    for _ in range(2):
        optimiser.zero_grad()
        losses = student(PICTURES, BOXES)
        (sum(losses.values()) + kd.loss()).backward()
        optimiser.step()
    layer = [p for n, p in student.named_parameters() if ".kd." in n]
    assert len(layer) == 6
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer)
    assert kd.terms["FitNetLoss.fpn"] > 0

    kd.detach()
    student.eval()
    images = student.transform(PICTURES)[0].tensors
    expected, found = student.backbone(images), student(PICTURES)
    assert torch.equal(found[0]["boxes"], copy.deepcopy(student)(PICTURES)[0]["boxes"])
    assert torch.equal(found[0]["boxes"], bake(student)(PICTURES)[0]["boxes"])
    exported = torch.export.export(student.backbone, (images,)).module()
    torch.testing.assert_close(exported(images), dict(expected))
    save_student(student.backbone, tmp_path / "backbone.pt")
    fresh = load_student(fpn().eval(), tmp_path / "backbone.pt")
    assert torch.equal(flat(fresh(images)), flat(expected))


def test_the_teacher_of_a_detector_sees_the_normalised_padded_batch():
    """The loss equals that of both backbones on the images that the detector prepares."""
    student, _, kd = attached_detector()
    student(PICTURES, BOXES)
    inside = kd.loss().detach()
    student.backbone(student.transform(PICTURES)[0].tensors)
    torch.testing.assert_close(kd.loss().detach(), inside)


def test_validation_of_a_detector_between_two_steps_changes_nothing():
    student, _, kd = attached_detector()
    images = torch.randn(2, 3, 64, 64)
    student.backbone(images)
    expected = kd.loss().detach()
    with torch.no_grad():
        student.eval()(PICTURES)
    student.train().backbone(images)
    torch.testing.assert_close(kd.loss().detach(), expected)
