"""The methods of letKD's comparison, and the settings that depend on the pair or the data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from kdlayers import (
    AttentionTransferLoss,
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
    DKDLoss,
    FitNetLoss,
    KDHandle,
    KDLoss,
    KDPoint,
    attach_kd,
)
from kdlayers.schedules import LinearWarmup

METHODS = ("labels", "kd", "dkd", "fitnet", "at", "layers", "quest", "letkd-1", "letkd-2")
WITHOUT_TEACHER = ("labels", "layers")


@dataclass(frozen=True)
class Taps:
    """The modules of a network that the comparison reads.

    Attributes:
        first: the first block of the last stage, letKD-2's first point.
        last: the last feature map before pooling.
        stages: the stages for attention transfer; FitNet uses the second one.
    """

    first: str = "layer3.0"
    last: str = "last"
    stages: tuple[str, ...] = ("layer1", "layer2", "layer3")


@dataclass(frozen=True)
class Pair:
    """A teacher, a student, and the settings of the pair.

    Attributes:
        teacher: name of the teacher.
        student: name of the student.
        taps: those of the student and of the teacher.
        lr: initial learning rate.
        beta: weight of DKD's non-target term.
        alphas: value ratios of letKD's first and last layer.
        temperature: of KD and DKD.
        kd_weight: weight of KD; cross-entropy has the rest.
        warmup: epochs over which DKD is ramped up.
        published: top-1 accuracy in % for each method, from letKD's supplement.
    """

    teacher: str
    student: str
    taps: tuple[Taps, Taps]
    lr: float
    beta: float
    alphas: tuple[float, float] = (1.0, 1.0)
    temperature: float = 4.0
    kd_weight: float = 0.9
    warmup: int = 20
    published: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Sizes:
    """Options of letKD's layers and targets; defaults are the authors' values for CIFAR-100."""

    num_templates: int = 4096
    sharpness: float = 1.0
    subclasses: int = 8
    components: int = 60


COLUMNS = ("teacher", "labels", "kd", "fitnet", "at", "dkd", "quest", "letkd-1", "letkd-2")


def published(*numbers: float | None) -> dict[str, float]:
    """The numbers by name, in the order of `COLUMNS`, without the missing ones (``None``)."""
    return {k: v for k, v in zip(COLUMNS, numbers, strict=True) if v is not None}


def ce_weight(method: str, pair: Pair) -> float:
    """Weight of the cross-entropy: 1 minus KD's weight for KD, 1 for the other methods."""
    return round(1.0 - pair.kd_weight, 6) if method == "kd" else 1.0


def attach(
    method: str,
    pair: Pair,
    student: nn.Module,
    teacher: nn.Module | None,
    steps_per_epoch: int,
    example: torch.Tensor,
    classes: int,
    sizes: Sizes,
) -> KDHandle | None:
    """Attach the method to the student; ``None`` if the method needs no handle.

    Args:
        method: one of `METHODS`. ``layers`` is a control for capacity: letKD-2's layers without
            their supervision.
        pair: the pair, with its weights and points.
        student: the student, without layers.
        teacher: the teacher; ``None`` for ``labels`` and ``layers``.
        steps_per_epoch: number of steps, for DKD's warm-up.
        example: two images.
        classes: number of classes.
        sizes: options of layers and targets.
    """
    if method == "labels":
        return None
    if method == "layers":
        counts = (classes * sizes.subclasses, sizes.num_templates)
        places = zip((pair.taps[0].first, pair.taps[0].last), counts, pair.alphas, strict=True)
        points = [KDPoint(name, num_templates=k, alpha=alpha) for name, k, alpha in places]
        attach_kd(student, at=points, example=example)
        return None
    points, losses = _points(method, pair, sizes), _losses(method, pair, steps_per_epoch)
    return attach_kd(student, teacher, points, losses=losses, example=example)


def _points(method: str, pair: Pair, sizes: Sizes) -> list[KDPoint]:
    if method not in ("quest", "letkd-1", "letkd-2"):
        return []
    ours, theirs = pair.taps
    # QuEST is letKD-1 with a layer that does not change the features.
    alpha = 0.0 if method == "quest" else pair.alphas[1]
    codebook = CodebookTargets(sizes.num_templates, sharpness=sizes.sharpness)
    points = [KDPoint(ours.last, theirs.last, targets=codebook, alpha=alpha)]
    if method == "letkd-2":
        decisions = DecisionTargets(sizes.subclasses, components=sizes.components)
        first = KDPoint(ours.first, theirs.first, targets=decisions, alpha=pair.alphas[0])
        points.insert(0, first)
    return points


def _losses(method: str, pair: Pair, steps_per_epoch: int) -> list[DistillLoss]:
    ours, theirs = pair.taps
    if method == "kd":
        return [KDLoss(temperature=pair.temperature, weight=pair.kd_weight)]
    if method == "dkd":
        # min((epoch + 1) / warmup, 1), as in the authors' code.
        ramp = LinearWarmup(pair.warmup - 1, start=1 / pair.warmup, steps_per_epoch=steps_per_epoch)
        return [DKDLoss(alpha=1.0, beta=pair.beta, temperature=pair.temperature, weight=ramp)]
    if method == "fitnet":
        return [FitNetLoss(weight=100.0, at=(ours.stages[1], theirs.stages[1]))]
    if method == "at":
        stages = zip(ours.stages, theirs.stages, strict=True)
        return [AttentionTransferLoss(weight=1000.0, at=names) for names in stages]
    return []
