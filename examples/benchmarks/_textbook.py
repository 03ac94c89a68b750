"""Losses on the logits, written directly from their papers for comparison.

Nothing of kdlayers is used here. Every function takes student and teacher logits ``[B, K]`` and
labels ``[B]``. Losses with parameters are modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

T = 4.0


def kd(student: Tensor, teacher: Tensor, _labels: Tensor, temperature: float = T) -> Tensor:
    """Hinton et al. 2015: KL divergence between softened distributions."""
    ours = F.log_softmax(student / temperature, dim=1)
    theirs = F.softmax(teacher / temperature, dim=1)
    return F.kl_div(ours, theirs, reduction="batchmean") * temperature**2


def standardized_kd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Sun et al. 2024: `kd` of logits standardised over the classes."""

    def scaled(logits: Tensor) -> Tensor:
        centred = logits - logits.mean(dim=1, keepdim=True)
        return centred / (1e-7 + logits.std(dim=1, keepdim=True))

    return kd(scaled(student), scaled(teacher), labels)


def mutual(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Zhang et al. 2018: `kd` at temperature 1."""
    return kd(student, teacher, labels, temperature=1.0)


def dkd(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Zhao et al. 2022: the target term plus 8 times the non-target term."""
    mask = F.one_hot(labels, student.shape[1]).bool()
    ours, theirs = F.softmax(student / T, dim=1), F.softmax(teacher / T, dim=1)
    s, a = ours[mask], theirs[mask]
    binary_s, binary_a = torch.stack([s, 1 - s], 1), torch.stack([a, 1 - a], 1)
    target = F.kl_div(binary_s.log(), binary_a, reduction="batchmean")
    rest_s = F.log_softmax((student / T).masked_fill(mask, -1e4), dim=1)
    rest_a = F.softmax((teacher / T).masked_fill(mask, -1e4), dim=1)
    others = F.kl_div(rest_s, rest_a, reduction="batchmean")
    return T**2 * (target + 8.0 * others)


class AEKT(nn.Module):
    """A linear layer on the student's logits; then `dkd` and the adaptive term."""

    def __init__(self, classes: int, form: str) -> None:
        super().__init__()
        self.fc = nn.Linear(classes, classes)
        self.form = form

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        mapped = self.fc(student)
        index = labels[:, None]
        s = F.softmax(mapped / T, dim=1).gather(1, index)
        a = F.softmax(teacher / T, dim=1).gather(1, index)
        values = {
            "chi2": lambda: (s - a) ** 2 / s,
            "ratio_sq": lambda: a**2 / s,
            "ratio": lambda: a / s,
            "is": lambda: a / s - (a / s).log() - 1,
        }
        return dkd(mapped, teacher, labels) + T**2 * values[self.form]().mean()


class StudentFriendly(nn.Module):
    """`kd` after attention within each sample has simplified the teacher's softened logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        width = min(classes, 128)
        self.query, self.key, self.value = (nn.Linear(classes, width) for _ in range(3))
        self.output = nn.Linear(width, classes)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        softened = teacher / T
        query, key, value = (f(softened) for f in (self.query, self.key, self.value))
        scores = query[:, :, None] * key[:, None, :]
        attended = (F.softmax(scores, dim=2) @ value[:, :, None])[:, :, 0]
        simplified = softened + self.output(attended)
        return kd(student, T * simplified, labels)
