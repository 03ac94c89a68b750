"""Losses on relations, channels and features, written directly from their papers for comparison.

Nothing of kdlayers is used here. Every function takes student and teacher tensors and the labels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dist(student: Tensor, teacher: Tensor, _labels: Tensor) -> Tensor:
    """Huang et al. 2022: correlation of the probabilities within samples and within classes."""
    ours, theirs = F.softmax(student, dim=1), F.softmax(teacher, dim=1)

    def relation(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return 1 - F.cosine_similarity(a, b, dim=1).mean()

    return relation(ours, theirs) + relation(ours.t(), theirs.t())


def rkd(student: Tensor, teacher: Tensor, _labels: Tensor) -> Tensor:
    """Park et al. 2019: distances divided by their mean, and angles, from all differences."""

    def distances(features: Tensor) -> Tensor:
        squares = features.pow(2).sum(1)
        table = squares[:, None] + squares[None] - 2 * features @ features.t()
        table = table.clamp(min=1e-12).sqrt()
        table = table * (1 - torch.eye(len(features), device=features.device))
        return table / table[table > 0].mean()

    def angles(features: Tensor) -> Tensor:
        units = F.normalize(features[None] - features[:, None], dim=2)
        return units @ units.transpose(1, 2)

    student, teacher = student.flatten(1), teacher.flatten(1)
    with torch.no_grad():
        wanted = distances(teacher), angles(teacher)
    distance = F.smooth_l1_loss(distances(student), wanted[0])
    return 25 * distance + 50 * F.smooth_l1_loss(angles(student), wanted[1])


def similarity(student: Tensor, teacher: Tensor, _labels: Tensor) -> Tensor:
    """Tung and Mori 2019: inner products of the samples, with rows normalised to unit length."""
    ours, theirs = student.flatten(1), teacher.flatten(1)
    ours, theirs = F.normalize(ours @ ours.t(), dim=1), F.normalize(theirs @ theirs.t(), dim=1)
    return (ours - theirs).pow(2).sum() / len(student) ** 2


def channelwise(
    student: Tensor, teacher: Tensor, _labels: Tensor, temperature: float = 4.0
) -> Tensor:
    """Shu et al. 2021: KL divergence of each channel's distribution over the positions."""
    ours = F.log_softmax(student.flatten(2) / temperature, dim=2)
    theirs = F.softmax(teacher.flatten(2) / temperature, dim=2)
    channels = student.shape[0] * student.shape[1]
    return F.kl_div(ours, theirs, reduction="sum") * temperature**2 / channels


def pixels(student: Tensor, teacher: Tensor, _labels: Tensor, temperature: float = 4.0) -> Tensor:
    """Hinton et al. 2015, at each pixel of class maps."""
    ours = F.log_softmax(student / temperature, dim=1)
    theirs = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="none").sum(1).mean() * temperature**2


def cosine(student: Tensor, teacher: Tensor, _labels: Tensor) -> Tensor:
    """One minus the cosine similarity over the channels, averaged over positions."""
    return 1 - F.cosine_similarity(student, teacher, dim=1).mean()


def mse(student: Tensor, teacher: Tensor, _labels: Tensor) -> Tensor:
    """The mean squared difference."""
    return F.mse_loss(student, teacher)
