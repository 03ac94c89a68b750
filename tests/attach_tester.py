"""Tests everything that attach_kd promises, for a student and a teacher."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    KDPoint,
    attach_kd,
    bake,
    find_points,
    load_student,
    save_student,
)
from kdlayers._utils.tree import leaves

CLASSES = 5


@dataclass
class AttachCase:
    """A student and a teacher, their points (earlier, last), and the images' size."""

    student: Callable[[], nn.Module]
    teacher: Callable[[], nn.Module]
    points: dict[str, str]
    size: int = 64
    images: Tensor = field(init=False)
    labels: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images = torch.randn(10, 3, self.size, self.size, generator=generator)
        self.labels = torch.arange(10) % CLASSES

    def run(self, folder: Path) -> None:
        torch.manual_seed(3)
        student, teacher = self.student(), self.teacher()
        self.candidates_are_listed(student)
        frozen = Frozen(teacher)
        before = outputs(student, self.images)
        keys = list(student.state_dict())
        flags = [module.training for module in student.modules()]
        random = torch.get_rng_state()

        kd = attach_kd(student, teacher, self.kd_points(), example=self.images[:2])
        kd.fit([(self.images, self.labels)], progress=False)

        assert torch.equal(random, torch.get_rng_state())
        layers = [m for n, m in student.named_modules() if n.endswith("kd") and hasattr(m, "head")]
        assert flags == [m.training for n, m in student.named_modules() if ".kd" not in f".{n}"]
        assert [key for key in student.state_dict() if ".kd." not in key] == keys
        assert len(layers) == len(self.points)
        self.step_reaches_every_layer(student, kd)
        assert frozen.unchanged(teacher)

        trained = outputs(student, self.images)
        assert not torch.equal(trained, before)
        assert torch.equal(outputs(copy.deepcopy(student), self.images), trained)
        kd.detach()
        assert torch.equal(outputs(student, self.images), trained)
        save_student(student, folder / "student.pt")
        fresh = load_student(self.student(), folder / "student.pt")
        assert torch.equal(outputs(fresh, self.images), trained)
        assert torch.equal(outputs(bake(student), self.images), trained)

        kd.remove()
        assert list(student.state_dict()) == keys
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())

    def candidates_are_listed(self, student: nn.Module) -> None:
        names = [candidate.name for candidate in find_points(student, self.images[:2])]
        for name in self.points:
            assert name in names, f"{name} not in {names}"

    def kd_points(self) -> list[KDPoint]:
        *early, last = self.points.items()
        decisions = partial(DecisionTargets, 2, components=3, num_classes=CLASSES)
        return [
            *(KDPoint(s, t, targets=decisions()) for s, t in early),
            KDPoint(*last, targets=CodebookTargets(6)),
        ]

    def step_reaches_every_layer(self, student: nn.Module, kd: Any) -> None:
        student.train()
        optimiser = torch.optim.SGD(student.parameters(), lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            loss = task_loss(student(self.images), self.labels) + kd.loss(self.labels)
            loss.backward()
            optimiser.step()
        assert torch.isfinite(loss)
        for name, parameter in student.named_parameters():
            if ".kd." in name:
                assert parameter.grad is not None, name
                assert torch.isfinite(parameter.grad).all(), name
                assert parameter.grad.abs().sum() > 0, name


class Frozen:
    """A model's tensors, flags and requires_grad at one moment."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {key: value.clone() for key, value in model.state_dict().items()}
        self.flags = [module.training for module in model.modules()]
        self.grads = [parameter.requires_grad for parameter in model.parameters()]

    def unchanged(self, model: nn.Module) -> bool:
        now = model.state_dict()
        return (
            all(torch.equal(now[key], value) for key, value in self.tensors.items())
            and self.flags == [module.training for module in model.modules()]
            and self.grads == [parameter.requires_grad for parameter in model.parameters()]
            and all(parameter.grad is None for parameter in model.parameters())
        )


def task_loss(output: Any, labels: Tensor) -> Tensor:
    """Cross-entropy of logits, or of all positions of maps; the sum over several outputs."""
    parts = [t.flatten(2) if t.dim() > 2 else t for _, t in leaves(output)]
    each = [labels if t.dim() == 2 else labels[:, None].expand(-1, t.shape[2]) for t in parts]
    losses = [F.cross_entropy(t, y) for t, y in zip(parts, each, strict=True)]
    return torch.stack(losses).sum()


def flat(output: Any) -> Tensor:
    """All tensors of an output, one row an image."""
    return torch.cat([t.flatten(1) for _, t in leaves(output)], dim=1)


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs in eval mode; restores all training flags."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return flat(model(images))
    finally:
        for module, flag in flags:
            module.training = flag
