"""What a user's type checker must understand, strictly: never run, only checked."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import assert_type

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
    DKDLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDHandle,
    KDLayer,
    KDLoss,
    KDPoint,
    MutualLoss,
    attach_kd,
    attach_mutual,
    bake,
    find_points,
    fold,
    load_student,
    prune_templates,
    save_student,
)
from kdlayers.errors import KDLayersError, NoMatchError
from kdlayers.functional import dkd, kd
from kdlayers.schedules import Cosine, LinearWarmup

Loader = Iterable[tuple[Tensor, Tensor]]


class Net(nn.Module):
    """A custom model, whose type load_student keeps."""

    def classes(self) -> int:
        """Something that plain modules do not have."""
        return 10


class LogitMSE(DistillLoss):
    """A custom loss."""

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """Mean squared difference."""
        return (student - teacher).square().mean()


def three_lines(student: nn.Module, teacher: nn.Module, loader: Loader) -> KDHandle:
    """README's example."""
    handle = attach_kd(student, teacher, at=["layer3.0", "layer4"])
    optimizer = torch.optim.SGD([*student.parameters(), *handle.parameters()], lr=0.1)
    handle.fit(loader, seed=1, progress=False)
    for x, y in loader:
        loss = F.cross_entropy(student(x), y) + handle.loss(y)
        assert_type(handle.loss(y), Tensor)
        loss.backward()
        optimizer.step()
    assert_type(handle.terms, dict[str, Tensor])
    assert_type(handle.summary(), str)
    return handle


def points_and_losses(student: Net, teacher: nn.Module, x: Tensor) -> None:
    """Every form of ``at``, several losses and teachers."""
    names: list[str] = [point.name for point in find_points(student, example=x)]
    attach_kd(student, teacher, names)
    attach_kd(student, teacher, "layer4")
    attach_kd(student, teacher, {"layer4": "stages.3"}, memory="low")
    ramp = LinearWarmup(100)
    decisions = KDPoint("layer3", targets=DecisionTargets(subclasses=2), weight=ramp)
    points = [decisions, KDPoint("layer4", "stages.3", targets=CodebookTargets(512), alpha=0.5)]
    losses = [
        KDLoss(temperature=4.0, weight=Cosine(100, value=0.9)),
        DKDLoss(beta=2.0, weight=LinearWarmup(20) * 0.5),
        AEKTLoss(weight=lambda step: min(1.0, step / 100)),
        FitNetLoss(at=("layer4", "stages.3")),
        InheritExploreLoss(at="layer4", measure="cosine"),
        LogitMSE(weight=0.5),
    ]
    handle = attach_kd(
        student, [teacher, Net()], points, losses=losses, teacher_weights=[1, 2], example=x
    )
    handle.load_state_dict(handle.state_dict())
    handle.teach(x)
    with handle.batch(x):
        logits = student(x)
    handle.loss(logits=logits).backward()
    assert_type(attach_mutual(student, Net(), losses=[MutualLoss()]), tuple[KDHandle, KDHandle])


def leaving(student: Net, loader: Loader, x: Tensor) -> nn.Module:
    """Save, load, prune, bake and fold."""
    save_student(student, "student.pt")
    fresh = load_student(Net(), "student.pt")
    assert_type(fresh, Net)
    assert_type(fresh.classes(), int)
    pruned = prune_templates(fresh, loader, budget=0.01)
    assert_type(pruned[0].after, int)
    assert_type(bake(fresh), nn.Module)
    return fold(fresh)


def bare(student: Tensor, teacher: Tensor, y: Tensor) -> Tensor:
    """Losses and layers without attaching anything."""
    assert_type(KDLoss().forward(student, teacher), Tensor)
    assert_type(KDLayer(64, 512).enhance(student)[0], Tensor)
    return kd(student, teacher, temperature=2.0) + dkd(student, teacher, y)


def errors(student: nn.Module) -> str:
    """All exceptions are KDLayersErrors."""
    try:
        attach_kd(student, at=[KDPoint("layer9", num_templates=8)])
    except NoMatchError as error:
        return str(error)
    except KDLayersError:
        raise
    return ""
