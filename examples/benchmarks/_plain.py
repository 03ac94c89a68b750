"""A KD layer and its loss, written in the straightforward way for comparison.

Nothing of kdlayers is used here. The layer computes the paper's formulas one after the other with
full tensors and plain autograd. The loss turns scores and targets into ``[positions, templates]``
matrices and calls ``F.kl_div``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PlainLayer(nn.Module):
    """Cosine scores, batch norm, ReLU, cosine values, added to the features."""

    def __init__(self, channels: int, templates: int) -> None:
        super().__init__()
        self.templates = nn.Parameter(torch.randn(templates, channels) * sqrt(2 / channels))
        self.template_scale = nn.Parameter(torch.tensor([3.0]))
        self.norm = nn.BatchNorm1d(templates)
        self.values = nn.Parameter(torch.randn(channels, templates) * sqrt(2 / templates))
        self.value_scale = nn.Parameter(torch.tensor([1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features like x, [B, C, H, W] or [B, L, C], and the scores [positions, templates]."""
        return self.of_map(x) if x.dim() == 4 else self.of_tokens(x)

    def of_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kernel, values = F.normalize(self.templates), F.normalize(self.values)
        scores = self.template_scale * F.conv2d(F.normalize(x), kernel[:, :, None, None])
        norm = self.norm
        normed = F.batch_norm(  # as BatchNorm2d would
            scores, norm.running_mean, norm.running_var, norm.weight, norm.bias, self.training
        )
        assignment = F.normalize(F.relu(normed))
        value = self.value_scale * F.conv2d(assignment, values[:, :, None, None])
        return x + value, scores.permute(0, 2, 3, 1).flatten(0, 2)

    def of_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(0, 1)
        scores = self.template_scale * F.linear(F.normalize(rows), F.normalize(self.templates))
        assignment = F.normalize(F.relu(self.norm(scores)))
        value = self.value_scale * F.linear(assignment, F.normalize(self.values))
        return x + value.view_as(x), scores


def codebook(rows: Tensor, centers: Tensor, temperature: float = 1.0) -> Tensor:
    """Soft assignment of the teacher's features to the centres."""
    distances = rows.square().sum(1, keepdim=True) - 2 * rows @ centers.T + centers.square().sum(1)
    return torch.softmax(-temperature * distances, dim=1)


def decisions(rows: Tensor, labels: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The row of the decision table for each position's sub-class, the nearest of its class."""
    z = rows @ state["projection"].T + state["shift"]
    centers = state["centers"]
    distances = z.square().sum(1, keepdim=True) - 2 * z @ centers.T + centers.square().sum(1)
    subclasses = state["counts"].shape[1]
    own = torch.arange(len(centers), device=rows.device) // subclasses == labels[:, None]
    return state["decisions"][distances.masked_fill(~own, float("inf")).argmin(1)]


@dataclass
class PlainPoint:
    """A layer, the tensors of its fitted targets, and the outputs that the hooks have stored."""

    layer: PlainLayer
    state: dict[str, Tensor]
    scores: Tensor | None = None
    features: Tensor | None = None

    def on_student(self, _module: nn.Module, _args: object, x: Tensor) -> Tensor:
        enhanced, self.scores = self.layer(x)
        return enhanced

    def on_teacher(self, _module: nn.Module, _args: object, x: Tensor) -> None:
        self.features = x

    def loss(self, labels: Tensor, prefix: int) -> Tensor:
        scores, features = self.scores, self.features
        self.scores = self.features = None
        batch = len(labels)
        if features.dim() == 4:
            features = features.permute(0, 2, 3, 1).flatten(1, 2)
        if prefix:  # class tokens have scores but no targets
            scores = scores.view(batch, -1, scores.shape[1])[:, prefix:].flatten(0, 1)
        features = features[:, prefix:]
        labels = labels.repeat_interleave(features.shape[1])
        rows = features.flatten(0, 1)
        with torch.no_grad():
            if "decisions" in self.state:
                targets = decisions(rows, labels, self.state)
            else:
                targets = codebook(rows, self.state["centers"])
        return F.kl_div(F.log_softmax(scores, dim=1), targets, reduction="batchmean")


class PlainKD:
    """letKD without a library: layers in the student, added by hooks, and the loss."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        states: dict[str, tuple[int, dict[str, Tensor]]],
        prefix: int = 0,
    ) -> None:
        self.teacher, self.prefix = teacher, prefix
        self.points = {}
        for name, (channels, state) in states.items():
            layer = PlainLayer(channels, len(state["centers"])).to(state["centers"].device)
            point = self.points[name] = PlainPoint(layer, state)
            student.get_submodule(name).register_forward_hook(point.on_student)
            teacher.get_submodule(name).register_forward_hook(point.on_teacher)
        self.layers = nn.ModuleList(point.layer for point in self.points.values())

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Run the teacher and sum the losses of all points."""
        with torch.no_grad():
            self.teacher(images)
        return sum(point.loss(labels, self.prefix) for point in self.points.values())
