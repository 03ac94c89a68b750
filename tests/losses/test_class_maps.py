"""KDLoss on class maps [B, K, H, W]: pixels, sizes, and ignored labels."""

import pytest
import torch
import torch.nn.functional as F

from kdlayers import functional as kdf
from kdlayers.errors import ArgumentTypeError, ShapeError
from kdlayers.losses import KDLoss

from . import naive, naive_relations
from .loss_tester import LossTester


def with_labels(loss, student, teacher, targets):
    values = naive_relations.pixels(student, teacher)
    labels = targets.flatten().tolist() if targets.dim() == 3 else [0] * len(values)
    return naive.mean(v for v, y in zip(values, labels, strict=True) if y != -100)


class TestKDOnClassMaps(LossTester):
    make = KDLoss
    reference = staticmethod(with_labels)
    kind = "maps"

    def inputs(self, *args, **kwargs):
        """With labels of pixels, some of which are ignored."""
        student, teacher, _ = super().inputs(*args, **kwargs)
        draw = torch.Generator().manual_seed(7)
        labels = torch.randint(3, (len(student), *student.shape[2:]), generator=draw)
        labels[:, 0, 1] = -100
        return student, teacher, labels

    def test_labels_are_needed_hard_and_one_a_sample(self):
        """None are needed, and without them every pixel counts."""
        student, teacher, targets = self.inputs()
        loss = self.fresh(student, teacher)
        value = loss(student, teacher)
        torch.testing.assert_close(value, loss(student, teacher, targets.clamp(min=0)))
        assert not torch.equal(value, loss(student, teacher, targets))


class TestStandardizedKDOnClassMaps(TestKDOnClassMaps):
    make = staticmethod(lambda: KDLoss(standardize=True))

    @staticmethod
    def reference(loss, student, teacher, targets):
        student, teacher = (
            torch.tensor(
                [
                    naive_relations.standardized(z)
                    for z in maps.movedim(1, -1).flatten(0, 2).tolist()
                ],
                dtype=torch.float64,
            )
            .view(len(maps), *maps.shape[2:], -1)
            .movedim(-1, 1)
            for maps in (student, teacher)
        )
        return with_labels(loss, student, teacher, targets)


def maps(*size, seed=0, classes=5):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, classes, *size, generator=draw, dtype=torch.float64)


def test_pixels_are_samples():
    student, teacher = maps(3, 4), maps(3, 4, seed=1)
    rows = [z.movedim(1, -1).flatten(0, 2) for z in (student, teacher)]
    torch.testing.assert_close(kdf.kd(student, teacher), kdf.kd(*rows))
    found = kdf.kd(student, teacher, reduction="none")
    torch.testing.assert_close(found.flatten(), kdf.kd(*rows, reduction="none"))
    assert found.shape == (2, 3, 4)
    torch.testing.assert_close(kdf.kd(student, teacher, reduction="sum"), found.sum())


@pytest.mark.parametrize("size", [(8, 12), (2, 3), (4, 3)])
def test_the_teachers_map_is_interpolated_to_the_students_size(size):
    student, teacher = maps(4, 6), maps(*size, seed=1)
    resized = F.interpolate(teacher, (4, 6), mode="bilinear", antialias=True)
    torch.testing.assert_close(KDLoss()(student, teacher), kdf.kd(student, resized))
    flat = torch.ones_like(teacher) * teacher.mean((2, 3), keepdim=True)
    expected = kdf.kd(student, flat[:, :, :1, :1].expand_as(student))
    torch.testing.assert_close(KDLoss()(student, flat), expected)


def test_labels_of_another_size_select_the_pixels():
    student, teacher = maps(2, 3), maps(2, 3, seed=1)
    labels = torch.zeros(2, 4, 6, dtype=torch.long)
    labels[0, :2, 2:4] = 255  # one pixel of the map
    values = kdf.kd(student, teacher, reduction="none")
    expected = (values.sum() - values[0, 0, 1]) / 11
    loss = KDLoss(ignore_index=255)
    torch.testing.assert_close(loss(student, teacher, labels), expected)
    torch.testing.assert_close(loss(student, teacher, labels[:, None]), expected)
    torch.testing.assert_close(KDLoss()(student, teacher, labels), values.mean())


@pytest.mark.parametrize(("dtype", "label", "ignored"), [("uint8", 156, -100), ("int8", -1, 255)])
def test_narrow_labels_are_not_the_ignored_one_modulo_256(dtype, label, ignored):
    student, teacher = maps(2, 3), maps(2, 3, seed=1)
    labels = torch.zeros(2, 2, 3, dtype=getattr(torch, dtype))
    labels[0] = label
    torch.testing.assert_close(
        KDLoss(ignore_index=ignored)(student, teacher, labels), KDLoss()(student, teacher)
    )


def test_all_pixels_ignored_gives_zero():
    student = maps(2, 3).requires_grad_()
    value = KDLoss()(student, maps(2, 3, seed=1), torch.full((2, 2, 3), -100))
    value.backward()
    assert value == 0
    assert not student.grad.any()


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda s, t: KDLoss()(s, t[:, :4]), ShapeError, r"same images and classes, got \[2, 5, 2"),
        (lambda s, t: KDLoss()(s, t[:1]), ShapeError, "same images and classes, got"),
        (lambda s, t: KDLoss()(s, t[0]), ShapeError, "must be class maps"),
        (
            lambda s, t: KDLoss()(s[:, :1], t[:, :1]),
            ShapeError,
            "2 classes, .*; the softmax of one",
        ),
        (lambda s, t: KDLoss()(s, t, torch.tensor([0, 1])), ShapeError, "labels of the pixels"),
        (lambda s, t: KDLoss()(s, t.long()), ArgumentTypeError, "teacher must be a floating"),
        (lambda s, t: kdf.kd(s, t[:, :, :1]), ShapeError, "and of one size, got"),
    ],
)
def test_wrong_maps_are_named(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(maps(2, 3), maps(2, 3, seed=1))
