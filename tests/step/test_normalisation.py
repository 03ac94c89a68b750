"""Student and teacher with different normalisations; `fit` on images normalised differently."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from kdlayers import CodebookTargets, KDLoss, KDPoint, Renormalize, attach_kd
from kdlayers.errors import ArgumentError, ArgumentTypeError, KDLayersWarning, ShapeError
from kdlayers.functional import kd as kd_of
from tests.nets import Net

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def pictures(n=4, size=32, seed=0):
    """Images in 0..1, smooth as photographs are."""
    noise = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise, size, mode="bilinear")


def normalised(images, statistics):
    return v2.functional.normalize(images, *map(list, statistics))


# ---------------------------------------------------------------- Renormalize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_images_equal_those_normalised_by_torchvision(dtype):
    images = pictures()
    mine = Renormalize(student=IMAGENET, teacher=HALF)(normalised(images, IMAGENET).to(dtype))
    assert mine.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(
        mine.float(), normalised(images, HALF), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_size_resizes_as_torchvision_does(interpolation):
    images = pictures(size=48)
    change = Renormalize(IMAGENET, HALF, 32, interpolation=interpolation)
    mine = change(normalised(images, IMAGENET))
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.functional.resize(normalised(images, HALF), [32, 32], mode, antialias=True)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    assert Renormalize(IMAGENET, HALF, (16, 24))(images).shape[-2:] == (16, 24)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
def test_a_size_is_for_all_dtypes_and_leading_axes(dtype, interpolation):
    images = pictures(size=24).to(dtype)
    change = Renormalize(IMAGENET, HALF, np.int64(16), interpolation=interpolation)
    found = change(images)
    assert found.dtype == dtype
    tolerance = 1e-6 if dtype.itemsize > 2 else 0.05
    torch.testing.assert_close(
        found.float(), change(images.float()), rtol=tolerance, atol=tolerance
    )
    assert torch.equal(change(images[0]), found[0])
    assert torch.equal(change(torch.stack([images, images])), torch.stack([found, found]))


def test_the_images_given_are_kept_and_one_normalisation_changes_nothing():
    images = pictures()
    before = images.clone()
    Renormalize(IMAGENET, HALF)(images)
    assert torch.equal(images, before)
    assert Renormalize(HALF, HALF)(images) is images
    assert Renormalize(HALF, HALF, 32)(images) is images


def test_accepted_numbers_copies_and_repr():
    images = pictures()
    change = Renormalize((0.5, 0.5), (torch.tensor([0.0]), [1.0]))
    torch.testing.assert_close(change(images), images * 0.5 + 0.5)
    for copied in (copy.deepcopy(change), pickle.loads(pickle.dumps(change))):
        assert torch.equal(copied(images), change(images))
    assert repr(change) == "Renormalize(student=((0.5,), (0.5,)), teacher=((0.0,), (1.0,)))"


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ((0.5, HALF), ArgumentTypeError, r"student must be \(mean, std\)"),
        ((HALF, (0.5,)), ArgumentTypeError, r"teacher must be \(mean, std\)"),
        ((HALF, (0.5, "a")), ArgumentTypeError, "teacher's std must be a number"),
        ((HALF, (0.5, 0.0)), ArgumentError, "teacher's std must be above 0"),
        ((HALF, ((0.5, 0.5), 1.0)), ArgumentError, "the same channels"),
        ((HALF, HALF, 0), ArgumentError, "size must be 1 or more"),
        ((HALF, HALF, 8.0), ArgumentTypeError, "size must be an integer, got float"),
        ((HALF, HALF, (8,)), ArgumentError, r"one number, or height and width, got \(8,\)"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        Renormalize(*arguments)


def test_bad_images_and_interpolation():
    with pytest.raises(ArgumentError, match="bilinear, bicubic, got 'lanczos'"):
        Renormalize(HALF, HALF, 8, interpolation="lanczos")
    with pytest.raises(ArgumentTypeError, match="takes a floating-point tensor of images"):
        Renormalize(HALF, IMAGENET)(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"\[..., 3, height, width\], got \[2, 1, 4, 4\]"):
        Renormalize(HALF, IMAGENET)(torch.zeros(2, 1, 4, 4))


# ---------------------------------------------------------------- timm's statements


def timm_pair(teacher="test_efficientnet", **options):
    timm = pytest.importorskip("timm")
    student = timm.create_model("test_resnet", num_classes=5)
    return student, timm.create_model(teacher, num_classes=5, **options)


def test_auto_gives_the_teacher_its_own_normalisation():
    student, teacher = timm_pair()
    images = pictures(size=64)
    kd = attach_kd(student, teacher, losses=[KDLoss()], teacher_transform="auto")
    logits = student.train()(normalised(images, HALF))
    value = kd.loss()
    with torch.no_grad():
        taught = teacher.eval()(normalised(images, IMAGENET))
        plain = teacher(normalised(images, HALF))
    torch.testing.assert_close(value, kd_of(logits, taught), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(value, kd_of(logits, plain), rtol=1e-3)


@pytest.mark.parametrize(("options", "size"), [({}, 160), ({"img_size": 64}, 64)])
def test_auto_gives_a_teacher_of_one_size_that_size(options, size):
    student, teacher = timm_pair("test_vit", **options)
    seen = []
    teacher.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    kd = attach_kd(student, teacher, losses=[KDLoss()], teacher_transform="auto")
    student.train()(pictures(size=96))
    kd.loss()
    assert seen[-1] == (4, 3, size, size)


def test_auto_serves_each_of_several_teachers():
    student, first = timm_pair()
    second = timm_pair("test_convnext")[1]
    kd = attach_kd(
        student,
        [first, second],
        losses=[KDLoss(teacher_index=0, name="a"), KDLoss(teacher_index=1, name="b")],
        teacher_transform="auto",
    )
    images = pictures(size=64)
    logits = student.train()(normalised(images, HALF))
    kd.loss()
    with torch.no_grad():
        one = kd_of(logits, first.eval()(normalised(images, IMAGENET)))
        two = kd_of(logits, second.eval()(normalised(images, HALF)))
    torch.testing.assert_close(kd.terms["a"], one, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kd.terms["b"], two, rtol=1e-4, atol=1e-6)


def test_warns_about_different_normalisations_without_a_transform():
    student, teacher = timm_pair()
    with pytest.warns(KDLayersWarning, match=r"mean \(0.5, .* mean \(0.485, .*=\"auto\"\) if"):
        attach_kd(student, teacher, losses=[KDLoss()]).remove()
    attach_kd(student, teacher, losses=[KDLoss()], teacher_transform=lambda x: x).remove()
    student, teacher = timm_pair("test_convnext")
    attach_kd(student, teacher, losses=[KDLoss()]).remove()


def test_auto_needs_a_pretrained_cfg():
    student, teacher = timm_pair()
    with pytest.raises(ArgumentError, match=re.escape("Net has none; pass teacher_transform=Ren")):
        attach_kd(student, Net(classes=5), losses=[KDLoss()], teacher_transform="auto")
    with pytest.raises(ArgumentError, match="a function of the images or \"auto\", got 'imagenet'"):
        attach_kd(student, teacher, losses=[KDLoss()], teacher_transform="imagenet")


# ---------------------------------------------------------------- the images of fit


def handle():
    student = Net()
    point = KDPoint("last", targets=CodebookTargets(4))
    kd = attach_kd(student, Net(6), [point], example=pictures(2))
    return student.train(), kd


def train(student, kd, images, size=8):
    for part in images.split(size):
        student(part)
        kd.loss()


DIFFERENT = {
    "not normalised at all": lambda x: x,
    "another mean and std": lambda x: normalised(x, HALF),
    "0 to 255": lambda x: 255 * x,
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_warns_when_fit_images_are_normalised_differently(kind):
    student, kd = handle()
    images = pictures(48)
    kd.fit([(DIFFERENT[kind](images), None)], progress=False)
    with pytest.warns(KDLayersWarning, match=r"normalised differently: .* refit=True") as caught:
        train(student, kd, normalised(pictures(48, seed=1), IMAGENET))
    assert len(caught) == 1
    assert "kd.fit and of the training batches" in str(caught[0].message)


def test_augmentation_mixup_and_erasing_do_not_warn():
    student, kd = handle()
    kd.fit([(normalised(pictures(48), IMAGENET), None)], progress=False)
    images = normalised(pictures(48, seed=1), IMAGENET)
    mixed = 0.5 * images + 0.5 * images.flip(0)
    mixed[:, :, :8, :8] = torch.randn(48, 3, 8, 8)
    train(student, kd, mixed)


def test_few_images_do_not_warn_and_refit_checks_again():
    student, kd = handle()
    kd.fit([(pictures(8), None)], progress=False)
    train(student, kd, normalised(pictures(48), IMAGENET))
    kd.fit([(pictures(48), None)], progress=False, refit=True)
    with pytest.warns(KDLayersWarning, match="normalised differently"):
        train(student, kd, normalised(pictures(48), IMAGENET))
    kd.fit([(normalised(pictures(48), IMAGENET), None)], progress=False, refit=True)
    train(student, kd, normalised(pictures(48), IMAGENET))


IN_PLACE = v2.Normalize([0.1] * 3, [0.5] * 3, inplace=True)
SAYS_IN_PLACE = r"in place.*inplace=True.*x\.clone\(\)"


def test_a_transform_that_works_in_place_is_an_error():
    # The user's batch and the next teacher would get images that were converted once more.
    teachers = [Net(4), Net(4)]
    with pytest.raises(ArgumentError, match=SAYS_IN_PLACE):
        attach_kd(
            Net(4), teachers, losses=[KDLoss()], example=pictures(), teacher_transform=IN_PLACE
        )


@pytest.mark.parametrize("method", ["fit", "loss"])
def test_also_one_that_works_in_place_later(method):
    student, images = Net(4), pictures()
    kd = attach_kd(
        student,
        Net(4),
        [KDPoint("last", targets=CodebookTargets(4))],
        example=torch.zeros(2, 3, 32, 32),
        teacher_transform=lambda x: IN_PLACE(x if x.any() else x.clone()),
    )
    zeros = torch.zeros_like(images)
    if method == "fit":
        with pytest.raises(ArgumentError, match=SAYS_IN_PLACE):
            kd.fit([images], progress=False)
        return
    kd.fit([zeros], progress=False)
    student(images)
    with pytest.raises(ArgumentError, match=SAYS_IN_PLACE):
        kd.loss(torch.arange(4))
