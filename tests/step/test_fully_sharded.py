"""Two processes under FSDP2, and losses that read no logits under FSDP2 and DDP."""

import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd, bake
from kdlayers.errors import ArgumentError, AttachError, KDLayersWarning
from tests.nets import Net, batch
from tests.two_ranks import connect, on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]
IMAGES, LABELS = batch(12)


def build(*losses, mine=slice(None), teacher=None):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6) if teacher is None else teacher
    points = [KDPoint("first", targets=CodebookTargets(4))]
    kd = attach_kd(student, teacher, points, losses=losses, example=IMAGES[:2])
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    kd.fit([(IMAGES[mine], LABELS[mine])], progress=False)
    return student, kd


def sharded(student, parts=(), **options):
    from torch.distributed.fsdp import fully_shard

    for name in parts:
        fully_shard(student.get_submodule(name), **options)
    return fully_shard(student, **options)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def alone(rank, folder, wrapper):
    """Two steps on the KD loss only, whose points are in the middle of the student."""
    connect(rank)
    mine = slice(rank, None, 2)
    student, kd = build(FitNetLoss(at="first"), mine=mine)
    called = student
    if wrapper == "ddp":
        called = DistributedDataParallel(student)
    else:
        sharded(student, ["stem", "first", "last"] if wrapper == "parts" else [])
    train(called, student, kd, mine)
    if wrapper == "whole":
        student.reshard()
    torch.save([whole(p.detach()) for p in student.parameters()], Path(folder) / f"{rank}.pt")


def train(called, student, kd, mine):
    optimiser = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.01)
    for _ in range(2):
        optimiser.zero_grad()
        called(IMAGES[mine])
        kd.loss().backward()
        optimiser.step()


@pytest.mark.parametrize("wrapper", ["ddp", "whole", "parts"])
def test_a_loss_that_reads_no_logits_trains_as_in_one_process(wrapper):
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(alone, folder, wrapper)
        found = torch.load(Path(folder) / "0.pt", weights_only=True)
    student, kd = build(FitNetLoss(at="first"))
    before = student.stem[0].weight.detach().clone()
    train(student, student, kd, slice(None))
    assert not torch.equal(before, student.stem[0].weight)
    for (name, parameter), value in zip(student.named_parameters(), found, strict=True):
        torch.testing.assert_close(
            value, parameter.detach(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


def after_a_forward(rank, folder):
    """FSDP2 leaves the outermost module's parameters whole after a forward."""
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

    connect(rank)
    flat = FullyShardedDataParallel(Net(4), device_id=torch.device("cpu"))
    with pytest.raises(AttachError, match="wrapped in FSDP already"):
        attach_kd(flat, Net(6), losses=[KDLoss()], example=IMAGES[:2])
    mine = slice(rank, None, 2)
    student, kd = build(teacher=sharded(Net(6)))
    sharded(student)
    for _ in range(2):
        (F.cross_entropy(student(IMAGES[mine]), LABELS[mine]) + kd.loss(LABELS[mine])).backward()
    with pytest.raises(AttachError, match="wrapped in FSDP already"):
        attach_kd(student, Net(6), "last", example=IMAGES[:2])
    with pytest.raises(AttachError, match="needs the whole student"):
        bake(student)
    assert kd.state_dict()["teachers"] == [None]
    student(IMAGES[mine])
    with pytest.raises(ArgumentError, match="call it before fully_shard"):
        kd.gradient_norms(LABELS[mine])
    # The student gets a copy of the images in bfloat16.
    half, kd = build(KDLoss())
    half.stem[1] = nn.Identity()  # FSDP would keep the buffers of a batch norm in float32
    half.train()
    sharded(half, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    kd.teach(IMAGES)
    half(IMAGES)
    assert kd.loss(LABELS).isfinite()
    (Path(folder) / f"{rank}.done").touch()


def unseen(rank, folder):
    """An optimiser without the losses' parameters, made after FSDP has replaced the student's."""
    connect(rank)
    student, kd = build(FitNetLoss(at="first"))
    sharded(student, ["last"])
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", KDLayersWarning)
        for _ in range(2):
            (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
            optimiser.step()
    (said,) = [str(w.message) for w in seen if issubclass(w.category, KDLayersWarning)]
    assert "changed the student but not FitNetLoss.first:" in said
    (Path(folder) / f"{rank}.done").touch()


@pytest.mark.parametrize("work", [after_a_forward, unseen])
def test_what_holds_under_fsdp(work):
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(work, folder)
        assert len(list(Path(folder).glob("*.done"))) == 2
