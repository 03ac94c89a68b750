"""Detectors as a whole: attached by their full names, fitted from the loaders of their scripts."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd, bake, find_points
from kdlayers.errors import ArgumentError, NoMatchError

POINT = "backbone.body.layer4"


class Backbone(nn.Module):
    """Two stages, as small as a detector's backbone can be."""

    def __init__(self, width):
        super().__init__()
        stages = {"layer3": block(3, width, 8), "layer4": block(width, width, 2)}
        self.body = nn.Sequential(OrderedDict(stages))
        self.out_channels = width

    def forward(self, images):
        return self.body(images)


def block(channels, width, stride):
    conv = nn.Conv2d(channels, width, 3, stride, padding=1)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def detector(kind=FasterRCNN, width=8, **options):
    anchors = AnchorGenerator(((32, 64),), ((0.5, 1.0),))
    options = {"min_size": 64, "max_size": 64, **options}
    if kind is FasterRCNN:
        options |= {"rpn_anchor_generator": anchors, "rpn_pre_nms_top_n_train": 20}
    else:
        options |= {"anchor_generator": anchors}
    return kind(Backbone(width), 5, **options)


class Pictures(torch.utils.data.Dataset):
    """Images of several sizes with their boxes, as a detection data set gives them."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        image = torch.rand(3, 48 + 4 * (index % 3), 64, generator=generator)
        boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0]])
        return image, {"boxes": boxes, "labels": torch.tensor([2])}


def collate(batch):
    return tuple(zip(*batch, strict=True))


def loader():
    return DataLoader(Pictures(), batch_size=4, collate_fn=collate)


def attached(kind=FasterRCNN, **options):
    student, teacher = detector(kind, **options), detector(kind, width=12)
    points = [KDPoint(POINT, targets=CodebookTargets(4))]
    losses = [FitNetLoss(at="backbone.body.layer3")]
    kd = attach_kd(student, teacher, points, losses=losses)
    return student, teacher, kd


@pytest.mark.parametrize("kind", [FasterRCNN, RetinaNet])
def test_the_loop_of_a_detection_script(kind):
    student, _, kd = attached(kind)
    optimiser = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=1e-3)
    kd.fit(loader(), progress=False)
    student.train()
    layer = [p for n, p in student.named_parameters() if ".kd." in n]
    for images, targets in loader():
        images, targets = list(images), [dict(target) for target in targets]
        loss_dict = student(images, targets)
        losses = sum(loss_dict.values()) + kd.loss()
        optimiser.zero_grad()
        losses.backward()
        optimiser.step()
    assert len(layer) == 6
    assert all(p.grad.isfinite().all() and p.grad.any() for p in layer)
    kd.detach()
    boxes = student.eval()([Pictures()[0][0]])[0]["boxes"]
    assert torch.equal(bake(student)([Pictures()[0][0]])[0]["boxes"], boxes)


def test_fitting_lists_equals_fitting_the_batches_of_the_backbone():
    student, teacher, kd = attached()
    kd.fit(loader(), progress=False)
    fitted = kd.state_dict()["losses"]["TemplateLoss.body.layer4"]
    kd.remove()
    points = [KDPoint("body.layer4", targets=CodebookTargets(4))]
    example = torch.zeros(2, 3, 64, 64)
    by_hand = attach_kd(student.backbone, teacher.backbone, points, example=example)
    student.transform.eval()
    batches = [(student.transform(list(images))[0].tensors, None) for images, _ in loader()]
    by_hand.fit(batches, progress=False)
    expected = by_hand.state_dict()["losses"]["TemplateLoss.body.layer4"]
    compared = [key for key in fitted if isinstance(fitted[key], torch.Tensor)]
    assert compared
    for key in compared:
        torch.testing.assert_close(fitted[key], expected[key])


def test_a_detector_that_draws_its_sizes_is_fitted_at_one_size():
    student, _, kd = attached(min_size=(48, 56, 64))
    student.train()
    assert student.transform.training
    kd.fit(loader(), progress=False)  # a warning here would mean that the passes differ
    assert student.transform.training


def test_names_inside_the_backbone_and_full_names_are_one():
    student, teacher = detector(), detector()
    images = [Pictures()[0][0], Pictures()[1][0]]
    names = [KDPoint(name, targets=CodebookTargets(4)) for name in ("body.layer3", POINT)]
    kd = attach_kd(student, teacher, names, example=images)
    assert list(kd.layers) == ["body.layer3", "body.layer4"]
    assert kd.student is student.backbone
    kd.remove()
    with pytest.raises(NoMatchError, match=r"'backbone.body.layer9' runs in the student"):
        attach_kd(student, teacher, ["backbone.body.layer9"])
    with pytest.raises(ArgumentError, match="a list of images"):
        attach_kd(student, teacher, [POINT], example=3)


def test_find_points_gives_names_that_may_be_used():
    student = detector()
    names = [point.name for point in find_points(student)]
    assert POINT in names
    assert all(name.startswith("backbone.") for name in names)
    attach_kd(student, at=[KDPoint(names[-1], num_templates=4)]).remove()


def test_losses_on_logits_are_refused():
    with pytest.raises(ArgumentError, match="backbone of a detector, which returns boxes"):
        attach_kd(detector(), detector(), losses=[KDLoss()])


def test_lists_for_something_else_than_a_detector_say_what_to_do():
    student, teacher = detector(), detector()
    points = [KDPoint("body.layer4", targets=CodebookTargets(4))]
    kd = attach_kd(student.backbone, teacher.backbone, points, example=torch.zeros(2, 3, 64, 64))
    with pytest.raises(ArgumentError, match=r"attach_kd\(detector, teacher, .*prepare="):
        kd.fit(loader(), progress=False)
    kd.fit(
        loader(),
        prepare=lambda batch: student.transform(list(batch[0]))[0].tensors,
        progress=False,
    )
