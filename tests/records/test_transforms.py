# ruff: noqa: NPY002 - transforms of users draw from NumPy's global generator
"""The transforms that people use give the same view again; those that cannot are refused."""

import random
from functools import partial

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.transforms import v2

from kdlayers import KDLoss, attach_kd
from kdlayers._records.views import check_repeatable, draw, image_check
from kdlayers.errors import RecordError
from tests.records.data import FlipAndCrop, OwnGenerator, Squares
from tests.records.test_training import Net


class Pictures(Dataset):
    """Pictures as PIL reads them, or as arrays."""

    def __init__(self, transform, kind=Image.fromarray, count=12):
        draw = np.random.default_rng(0)
        self.images = [draw.integers(256, size=(40, 48, 3), dtype=np.uint8) for _ in range(count)]
        self.transform, self.kind = transform, kind

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.transform(self.kind(self.images[index]))
        return image, index % 4


V1 = [
    transforms.RandomResizedCrop(16),
    transforms.RandomHorizontalFlip(),
    transforms.ColorJitter(0.4, 0.4, 0.4, 0.1),
    transforms.RandomRotation(20),
    transforms.RandAugment(),
    transforms.ToTensor(),
    transforms.RandomErasing(0.5),
]
V2 = [
    v2.ToImage(),
    v2.RandomResizedCrop(16),
    v2.RandomHorizontalFlip(),
    v2.TrivialAugmentWide(),
    v2.ElasticTransform(20.0, sigma=2.0),
    v2.ToDtype(torch.float32, scale=True),
    v2.GaussianNoise(),
    v2.RandomErasing(0.5),
]
TIMM = {
    "plain": {},
    "RandAugment": {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.5},
    "AugMix": {"auto_augment": "augmix-m5-w4-d2"},
    "AutoAugment": {"auto_augment": "original-mstd0.5", "re_prob": 0.5, "re_mode": "pixel"},
    "3-Augment": {"auto_augment": "3a", "color_jitter": 0.3, "gaussian_blur_prob": 0.3},
    "random interpolation": {"interpolation": "random"},
}


def timms(options):
    return timm.data.create_transform(16, is_training=True, **options)


TRANSFORMS = {
    "torchvision v1": partial(transforms.Compose, V1),
    "torchvision v2": partial(v2.Compose, V2),
    **{f"timm: {name}": partial(timms, options) for name, options in TIMM.items()},
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_view_is_a_function_of_seed_sample_and_view(name):
    dataset = Pictures(TRANSFORMS[name]())
    for sample in range(len(dataset)):
        first = draw(dataset, 1, sample, 2)[0]
        torch.rand(3), random.random(), np.random.rand()
        fresh = Pictures(TRANSFORMS[name]())  # as another process has it
        draw(fresh, 1, (sample + 1) % len(dataset), 0)
        assert torch.equal(first, draw(fresh, 1, sample, 2)[0])
    others = {image_check(draw(dataset, seed, 4, view)[0]) for seed in (1, 2) for view in range(3)}
    assert len(others) > 3
    assert check_repeatable(dataset, 0, 4)


@pytest.mark.parametrize(
    "transform",
    [lambda image: image + float(np.random.rand()), FlipAndCrop()],
    ids=["numpy", "python"],
)
def test_transforms_of_ones_own_draw_from_any_global_generator(transform):
    dataset = Squares(transform=transform)
    first = draw(dataset, 1, 4, 2)[0]
    torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(first, draw(dataset, 1, 4, 2)[0])
    others = [draw(dataset, *which, 0)[0] for which in ((1, 4), (2, 4), (3, 4), (4, 4))]
    assert len({image_check(image) for image in others}) > 1
    assert check_repeatable(dataset, 0, 4)


# ------------------------------------------------------------------ generators of their own


class Composed:
    """Has the generators of albumentations.Compose, and the functions that set them."""

    def __init__(self):
        self.set_random_seed(None)

    def set_random_seed(self, seed):
        self.set_random_state(np.random.default_rng(seed), random.Random(seed))

    def set_random_state(self, random_generator, py_random):
        self.random_generator, self.py_random = random_generator, py_random

    def __repr__(self):
        return "Composed()"

    def __call__(self, image):
        image = image.flip(-1) if self.py_random.random() < 0.5 else image
        return image + float(self.random_generator.random())


@pytest.mark.parametrize("part", [False, True], ids=["whole", "subset"])
def test_generators_of_a_transform_are_seeded_and_given_back(part):
    whole = Squares(transform=Composed())
    dataset = Subset(whole, range(20)) if part else whole
    own = whole.transform.random_generator, whole.transform.py_random
    first = draw(dataset, 1, 4, 2)[0]
    assert (whole.transform.random_generator, whole.transform.py_random) == own
    torch.testing.assert_close(draw(dataset, 1, 4, 2)[0], first, rtol=0, atol=0)
    assert not torch.equal(draw(dataset, 1, 4, 3)[0], first)
    assert check_repeatable(dataset, 0, 4)


def test_albumentations(tmp_path):
    albumentations = pytest.importorskip("albumentations")
    pipeline = albumentations.Compose(
        [
            albumentations.RandomCrop(16, 16),
            albumentations.OneOf(
                [albumentations.HorizontalFlip(p=1), albumentations.VerticalFlip(p=1)]
            ),
            albumentations.RandomBrightnessContrast(),
            albumentations.GaussNoise(p=0.5),
            albumentations.CoarseDropout(p=0.5),
        ]
    )

    class Arrays(Pictures):
        def __getitem__(self, index):
            image = self.transform(image=self.images[index])["image"]
            return torch.from_numpy(image).permute(2, 0, 1) / 255, index % 4

    dataset = Arrays(pipeline)
    kd = attach_kd(Net(6), Net(8), losses=[KDLoss()], example=torch.zeros(2, 3, 16, 16))
    options = {"views": 2, "batch_size": 8, "progress": False}
    recorded = kd.record(dataset, tmp_path / "one", **options)
    recorded.set_epoch(1)
    assert len([recorded[index] for index in range(len(dataset))]) == 12  # each is compared
    kd.record(dataset, tmp_path / "two", **options)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


class Wrapped:
    """Hides a transform with generators of its own; ``seeds`` as the documentation says."""

    def __init__(self, seeds):
        self.inner, self.seeds = Composed(), seeds

    def __call__(self, image):
        if self.seeds:
            self.inner.set_random_seed(random.getrandbits(32))
        return self.inner(image)


@pytest.mark.parametrize("transform", [OwnGenerator, partial(Wrapped, seeds=False)])
def test_generators_that_cannot_be_found_are_refused(transform, tmp_path):
    dataset = Squares(transform=transform())
    with pytest.raises(RecordError, match=r"its own random generator.*random.getrandbits\(32\)"):
        check_repeatable(dataset, 0, 4)
    kd = attach_kd(Net(6), Net(8), losses=[KDLoss()], example=torch.zeros(2, 3, 12, 12))
    with pytest.raises(RecordError, match="its own random generator"):
        kd.record(dataset, tmp_path / "record", views=2)
    assert not (tmp_path / "record").exists()


def test_seeding_it_in_ones_own_code_makes_it_usable():
    assert check_repeatable(Squares(transform=Wrapped(seeds=True)), 0, 4)


def test_without_a_random_transform_all_views_are_equal():
    assert not check_repeatable(Squares(), 0, 4)
