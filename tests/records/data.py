"""A small data set with random flips and crops, whose every image is different."""

import random

import torch
from torch.utils.data import Dataset


class Squares(Dataset):
    """``count`` images of noise; crops and flips draw from Python's or torch's generator."""

    def __init__(self, count=24, size=12, transform=None):
        generator = torch.Generator().manual_seed(1)
        self.images = torch.rand(count, 3, size, size, generator=generator)
        self.transform = transform

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (image if self.transform is None else self.transform(image)), index % 4


class FlipAndCrop:
    """A mirror image half of the time, by torch's generator; a corner by Python's."""

    def __repr__(self):
        return "FlipAndCrop()"

    def __call__(self, image):
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        top, left = random.randrange(5), random.randrange(5)
        return image[:, top : top + 8, left : left + 8]


class OwnGenerator:
    """Flips by a generator that nobody can seed from outside."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, image):
        return image.flip(-1) if torch.rand((), generator=self.generator) < 0.5 else image
