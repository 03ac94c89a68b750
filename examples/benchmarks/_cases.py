"""The training steps that the benchmarks measure, on networks or on given features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _networks import NETWORKS, GivenFeatures, GivenTeacher, settle
from _plain import PlainKD
from _timing import Step
from torch import Tensor, nn

from kdlayers import CodebookTargets, DecisionTargets, DistillLoss, KDPoint, attach_kd

COMPONENTS = 60
VARIANTS = ("floor", "plain", "kdlayers", "kdlayers, low memory")

Loss = Callable[[Tensor, Tensor], Tensor | float]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A pair of networks, or of given features, with KD layers at the last point or at both points.

    With ``networks``, a step is a whole training step with SGD. Without, ``size`` is the height and
    width of the features or the number of tokens, and a step contains only what the KD layers add:
    their forward, the loss and the backward, and a linear classifier on the mean over positions.
    """

    networks: str | None
    batch: int
    size: tuple[int, ...]
    channels: int
    teacher_channels: int
    templates: int
    classes: int = 100
    subclasses: int = 8
    points: tuple[str, str] = ("first", "last")
    layers: int = 1

    @property
    def prefix(self) -> int:
        """Number of class tokens before the grid."""
        return int(self.networks == "vit" or len(self.size) == 1)


def make_networks(case: Case) -> tuple[nn.Module, nn.Module, Tensor]:
    """Student, teacher and their input."""
    kind, classes = case.networks, case.classes
    if kind is None:
        channels, wide = case.channels, case.teacher_channels
        teacher = GivenTeacher(features(case, wide), wide, classes)
        return GivenFeatures(channels, classes), teacher, features(case, channels)
    images = torch.randn(case.batch, 3, *case.size)
    student, teacher = NETWORKS[kind](classes)
    for network in (student, teacher):
        settle(network, images)
    return student, teacher, images


def features(case: Case, channels: int) -> Tensor:
    """Random features: maps are not negative, as after a ReLU; tokens have both signs."""
    if len(case.size) == 1:
        return torch.randn(case.batch, 1 + case.size[0], channels)
    return F.relu(torch.randn(case.batch, channels, *case.size))


def build(case: Case, variant: str, device: str = "cpu") -> Step:
    """Create the step of a variant, with its networks and data."""
    torch.manual_seed(0)
    student, teacher, images = make_networks(case)
    student, teacher, images = student.to(device), teacher.to(device).eval(), images.to(device)
    labels = torch.arange(case.batch, device=device) % case.classes
    loss, added = add(case, variant, student, teacher, images)
    if case.networks is None:
        images.requires_grad_()  # the gradient to the features is part of the layers' cost
        return training_step(student, loss, images, labels, None, [images, *added])
    return training_step(student, loss, images, labels, sgd([*student.parameters(), *added]))


def sgd(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser of all steps; duplicate parameters are removed."""
    return torch.optim.SGD(list(dict.fromkeys(parameters)), 0.01, momentum=0.9, nesterov=True)


def training_step(
    student: nn.Module,
    loss: Loss,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer | None,
    others: Sequence[Tensor] = (),
) -> Step:
    """Forward, cross-entropy plus ``loss``, backward, and SGD if there is an optimiser."""
    tensors = [*student.parameters(), *others]

    def step() -> Tensor:
        total = F.cross_entropy(student(images), labels) + loss(images, labels)
        total.backward()
        if optimizer is not None:
            optimizer.step()
        for tensor in tensors:
            tensor.grad = None
        return total.detach()

    return step


def add(
    case: Case, variant: str, student: nn.Module, teacher: nn.Module, images: Tensor
) -> tuple[Loss, list[nn.Parameter]]:
    """Add the variant; returns a loss of images and labels, and the parameters to train."""
    if variant == "floor":
        return run_teacher(teacher), []
    states = fitted(case, teacher, images)
    if variant == "plain":
        sizes = {name: (case.channels, state) for name, state in states.items()}
        plain = PlainKD(student, teacher, sizes, case.prefix)
        return plain.loss, list(plain.layers.parameters())
    points = [KDPoint(name, targets=targets(case, state)) for name, state in states.items()]
    memory = "low" if variant.endswith("low memory") else "normal"
    kd = attach_kd(student, teacher, points, example=images[:2].detach(), memory=memory)
    return lambda _, labels: kd.loss(labels), list(kd.parameters())


def add_losses(losses: Sequence[DistillLoss], student: nn.Module, teacher: nn.Module,
               images: Tensor) -> tuple[Loss, list[nn.Parameter]]:  # fmt: skip
    """Add losses on the logits with `attach_kd`."""
    kd = attach_kd(student, teacher, losses=losses, example=images[:2])
    return lambda _, labels: kd.loss(labels), list(kd.parameters())


def run_teacher(teacher: nn.Module) -> Loss:
    """The floor: the teacher's forward, whose output is not used."""

    def loss(images: Tensor, _labels: Tensor) -> float:
        with torch.no_grad():
            teacher(images)
        return 0.0

    return loss


def targets(case: Case, state: State) -> CodebookTargets | DecisionTargets:
    """The library's targets, loaded with fitted tensors."""
    made = (
        DecisionTargets(case.subclasses, components=COMPONENTS)
        if "decisions" in state
        else CodebookTargets(case.templates)
    )
    made.load_state_dict(state)
    return made


@torch.no_grad()
def fitted(case: Case, teacher: nn.Module, images: Tensor) -> dict[str, State]:
    """Quick replacements for the tensors that `fit` learns, with centres close to features."""
    found: list[Tensor] = []
    module = teacher.get_submodule(case.points[1])
    hook = module.register_forward_hook(lambda _m, _a, output: found.append(output))
    teacher(images)
    hook.remove()
    rows = found[0].movedim(1, -1) if found[0].dim() == 4 else found[0]
    rows = rows.flatten(0, -2)
    chosen = rows[torch.arange(case.templates, device=rows.device) * 7 % len(rows)]
    last = {
        "centers": chosen + 0.1 * torch.randn_like(chosen),
        "counts": torch.ones(case.templates, dtype=torch.long, device=rows.device),
        "inertia": torch.zeros((), device=rows.device),
    }
    if case.layers == 1:
        return {case.points[1]: last}
    return {case.points[0]: decided(case, rows), case.points[1]: last}


def decided(case: Case, rows: Tensor) -> State:
    """A random discriminant projection, random sub-classes and random decisions."""
    total, width = case.classes * case.subclasses, rows.shape[1]
    size = min(COMPONENTS, case.classes - 1, width)
    centers = torch.randn(total, size, device=rows.device)
    return {
        "projection": torch.randn(size, width, device=rows.device) / width**0.5,
        "shift": torch.zeros(size, device=rows.device),
        "centers": centers,
        "prototypes": centers.clone(),
        "decisions": (4 * torch.randn(total, total, device=rows.device)).softmax(1),
        "counts": torch.ones(case.classes, case.subclasses, dtype=torch.long, device=rows.device),
    }
