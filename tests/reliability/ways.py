"""Several ways to the same numbers: do they agree?

Each try attaches random losses to a random student and a random teacher, and computes the loss and
the student's gradients from one batch. The same handle computes them again with ``kd.teach`` before
the student, and from a record. Two more handles load its state and compute them with
``memory="low"`` and with ``RecordedTeacher``. After that, the student without its teacher is saved
and loaded, baked, folded and pruned, and its layers are removed. Networks are those of layouts.py,
and in one try of ten timm's small networks for tests.
"""

import copy
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from kdlayers import (
    AttentionTransferLoss,
    BinaryKDLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDHandle,
    KDLoss,
    KDPoint,
    RecordedTeacher,
    SimilarityPreservingLoss,
    attach_kd,
    bake,
    find_points,
    fold,
    load_student,
    prune_templates,
    save_student,
)
from kdlayers.errors import KDLayersError
from tests.reliability.layouts import network, sides

Pair = tuple[str, str]
IMAGES, CLASSES = 6, 3
LOSSES: dict[str, Callable[[Pair], DistillLoss]] = {
    "KD": lambda at: KDLoss(),
    "DKD": lambda at: DKDLoss(),
    "DIST": lambda at: DISTLoss(),
    "binary": lambda at: BinaryKDLoss(),
    "features": lambda at: FeatureLoss(at=at, normalize_teacher=True, name="features"),
    "pooled": lambda at: FeatureLoss(at=at, tokens="pooled", distance="smooth_l1", name="pooled"),
    "FitNet": lambda at: FitNetLoss(at=at),
    "attention": lambda at: AttentionTransferLoss(at=at),
    "similarity": lambda at: SimilarityPreservingLoss(at=at),
    "channels": lambda at: ChannelWiseLoss(at=at),
    "IE-KD": lambda at: InheritExploreLoss(at=at, epochs=1),
}
POINTS: dict[str, Callable[[Pair], list[KDPoint]]] = {
    "no layer": lambda at: [],
    "codebook": lambda at: [KDPoint(*at, targets=CodebookTargets(4))],
    "decisions": lambda at: [KDPoint(*at, targets=DecisionTargets(1, components=1))],
}
SMALL = (
    *("test_byobnet", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"),
    *("test_resnet", "test_vit", "test_vit2"),
)


@dataclass
class Setting:
    """Two networks, images, and what to attach."""

    student: nn.Module
    teacher: nn.Module
    images: Tensor
    at: Pair
    losses: list[str]
    point: str

    def attached(self, student: nn.Module, teacher: object, memory: str = "normal") -> KDHandle:
        """A handle with new losses. Its train-only parameters are always the same ones."""
        torch.manual_seed(0)
        losses = [LOSSES[name](self.at) for name in self.losses]
        points, example = POINTS[self.point](self.at), self.images[:2]
        return attach_kd(student, teacher, points, losses=losses, example=example, memory=memory)


def setting(rng: random.Random, *, timm: bool) -> Setting:
    """A random setting."""
    losses = rng.sample(sorted(LOSSES), rng.randint(1, 4))
    point = rng.choice(sorted(POINTS))
    if timm:
        student, teacher = (timm_network(rng.choice(SMALL)) for _ in range(2))
        images = torch.randn(IMAGES, 3, 96, 96)
        found = [find_points(model, images[:2]) for model in (student, teacher)]
        at = tuple(rng.choice(list(points)[-3:]).name for points in found)
    else:
        size = sides(rng)
        student, teacher = (network(rng, size, equal=False) for _ in range(2))
        images, at = torch.randn(IMAGES, 3, *size), ("body", "body")
    return Setting(student, teacher, images, at, losses, point)


def timm_network(name: str) -> nn.Module:
    """One of timm's small networks for tests."""
    import timm

    return timm.create_model(name, num_classes=CLASSES)


def one_try(rng: random.Random, *, timm: bool = False) -> str:
    """Do all ways of one setting agree?"""
    given = setting(rng, timm=timm)
    try:
        wrong = list(differences(given))
    except KDLayersError:
        return "refused"
    return f"silently wrong: {given.losses}, {given.point}: {wrong}" if wrong else "right"


def differences(given: Setting) -> Iterator[str]:
    """The ways whose numbers differ from those of the usual one."""
    plain = copy.deepcopy(given.student)
    labels = torch.arange(IMAGES) % CLASSES
    batch = given.images, labels
    kd = given.attached(given.student, given.teacher)
    kd.fit([batch], progress=False)
    start = copy.deepcopy((given.student.state_dict(), kd.state_dict()))

    def step(handle: KDHandle, key: Tensor | None = None, *, teach: bool = False) -> list[Tensor]:
        """The loss and the gradients, from the same state."""
        model = handle.student
        model.load_state_dict(start[0])
        handle.load_state_dict(copy.deepcopy(start[1]))
        model.train().zero_grad()
        torch.manual_seed(1)
        if teach:
            handle.teach(given.images)
        model(given.images)
        loss = handle.loss(labels, recorded=key)
        loss.backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        return [loss.detach(), torch.cat(grads)]

    usual = step(kd)
    if not alike(step(kd, teach=True), usual):
        yield "teach"
    low = given.attached(copy.deepcopy(plain), given.teacher, memory="low")
    if not alike(step(low), usual):
        yield "low memory"
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*set_epoch")
        data = TensorDataset(*batch)
        record = kd.record(data, folder, views=1, dtype="float32", batch_size=4, progress=False)
        key = torch.stack([record[index][-1] for index in range(IMAGES)])
        if not alike(step(kd, key), usual):
            yield "record"
        absent = given.attached(copy.deepcopy(plain), RecordedTeacher(folder))
        if not alike(step(absent, key), usual):
            yield "RecordedTeacher"
    kd.detach()
    given.student.eval()
    if given.point != "no layer":
        yield from other_forms(given.student, plain, given.images)
    kd.remove()
    plain.load_state_dict(given.student.state_dict())
    with torch.no_grad():
        if not torch.equal(given.student(given.images), plain.eval()(given.images)):
            yield "removed"


@torch.no_grad()
def other_forms(student: nn.Module, plain: nn.Module, images: Tensor) -> Iterator[str]:
    """The forms of a student without its teacher whose outputs differ from the student's."""
    with tempfile.TemporaryDirectory() as folder:
        save_student(student, Path(folder) / "student.pt")
        loaded = load_student(copy.deepcopy(plain), Path(folder) / "student.pt").eval()
    pruned = copy.deepcopy(student)
    prune_templates(pruned, [images])
    forms = {"loaded": loaded, "pruned": pruned, "baked": bake(student), "folded": fold(student)}
    outputs = student(images)
    for name, form in forms.items():
        if not alike([form(images)], [outputs]):
            yield name


def alike(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all numbers are finite and agree, up to the rounding of another order of sums."""
    return all(
        bool(torch.isfinite(b).all()) and bool((a - b).norm() <= 1e-3 * b.norm() + 1e-6)
        for a, b in zip(found, expected, strict=True)
    )


def run(tries: int, seed: int) -> dict[str, int]:
    """Counts of ``tries`` tries, one in ten of them with timm's networks."""
    rng, names = random.Random(seed), ("tried", "right", "refused", "silently wrong", "raw errors")
    counts = Counter(dict.fromkeys(names, 0))
    with torch.random.fork_rng(devices=[]):
        for index in range(tries):
            torch.manual_seed(seed * 1_000_003 + index)
            counts["tried"] += 1
            try:
                result = one_try(rng, timm=index % 10 == 9)
            except Exception as error:  # anything but an error of the library is a fault
                result = f"raw errors: {type(error).__name__}: {error}"
            if ":" in result:
                sys.stderr.write(f"try {index} of seed {seed}: {result}\n")
            counts[result.partition(":")[0]] += 1
    return dict(counts)
