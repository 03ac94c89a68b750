"""Ranks that differ: a step without KD loss, uneven batches, a destroyed process group."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdlayers import CodebookTargets, FeatureLoss, FitNetLoss, KDLoss, KDPoint, attach_kd
from kdlayers.errors import CaptureError
from tests.nets import Net, batch
from tests.two_ranks import connect, on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]
IMAGES, LABELS = batch(12)


def build(losses, teacher=None):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6) if teacher is None else teacher
    kd = attach_kd(student, teacher, losses=losses, example=IMAGES[:2])
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return student, kd


def connected(rank):
    connect(rank)
    return slice(rank, None, 2)


def asymmetric(rank, folder):
    """Three steps; in the second one rank 1 has no KD loss."""
    mine = connected(rank)
    student, kd = build([FitNetLoss(at="first"), KDLoss()])
    called = DistributedDataParallel(student)
    parameters = [*student.parameters(), *kd.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    grads = []
    for step in range(3):
        optimiser.zero_grad()
        loss = F.cross_entropy(called(IMAGES[mine]), LABELS[mine])
        if (step, rank) != (1, 1):
            loss = loss + kd.loss(LABELS[mine])
        loss.backward()
        grads.append([p.grad.clone() for p in parameters])
        optimiser.step()
    torch.save(grads, Path(folder) / f"{rank}.pt")


def test_a_rank_without_a_kd_loss_contributes_zeros():
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(asymmetric, folder)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for ours, theirs in zip(*ranks, strict=True):
        assert all(map(torch.equal, ours, theirs))
    # By hand, in one process: the mean of the two ranks' losses.
    student, kd = build([FitNetLoss(at="first"), KDLoss()])
    parameters = [*student.parameters(), *kd.parameters()]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    for step in range(3):
        optimiser.zero_grad()
        for rank in (0, 1):
            mine = slice(rank, None, 2)
            loss = F.cross_entropy(student(IMAGES[mine]), LABELS[mine])
            kd_loss = kd.loss(LABELS[mine])
            ((loss + (0 if (step, rank) == (1, 1) else kd_loss)) / 2).backward()
        for parameter, grad in zip(parameters, ranks[0][step], strict=True):
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
        optimiser.step()


def joined(rank, folder, losses):
    """Rank 0 has two batches and rank 1 has one."""
    mine = connected(rank)
    norm = FeatureLoss(at="first", projector=None, normalize_teacher=True)
    chosen = {"with": FitNetLoss(at="first"), "statistics": norm, "without": KDLoss()}[losses]
    student, kd = build([chosen], teacher=Net(4) if losses == "statistics" else None)
    called = DistributedDataParallel(student)
    expected = nullcontext()
    if losses != "without":
        expected = pytest.raises(CaptureError, match=r"inside .*join\(\) .*same number of")
    with expected, called.join():
        for _ in range(2 - rank):
            logits = called(IMAGES[mine])
            (F.cross_entropy(logits, LABELS[mine]) + kd.loss(LABELS[mine])).backward()
    (Path(folder) / f"{rank}.done").touch()


@pytest.mark.parametrize("losses", ["with", "statistics", "without"])
def test_uneven_batches_work_only_for_losses_without_parameters(losses):
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(joined, folder, losses)
        assert len(list(Path(folder).glob("*.done"))) == 2


def norms_on_one_rank(rank, folder):
    mine = connected(rank)
    student, kd = build([FitNetLoss(at="first"), FeatureLoss(at="last", normalize_teacher=True)])
    called = DistributedDataParallel(student)
    task = F.cross_entropy(called(IMAGES[mine]), LABELS[mine])
    if rank == 0:
        assert kd.gradient_norms(LABELS[mine], task=task)["task"] > 0
    else:
        kd.clear()
    (F.cross_entropy(called(IMAGES[mine]), LABELS[mine]) + kd.loss(LABELS[mine])).backward()
    torch.save([p.grad for p in kd.parameters()], Path(folder) / f"{rank}.pt")


def test_gradient_norms_wait_for_no_other_rank():
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(norms_on_one_rank, folder)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(map(torch.equal, *ranks))


def disconnected(rank, folder):
    mine = connected(rank)
    student, kd = build([FitNetLoss(at="first")])
    called = DistributedDataParallel(student)
    (F.cross_entropy(called(IMAGES[mine]), LABELS[mine]) + kd.loss(LABELS[mine])).backward()
    loss = F.cross_entropy(student(IMAGES[mine]), LABELS[mine]) + kd.loss(LABELS[mine])
    dist.destroy_process_group()
    loss.backward()
    student.zero_grad()
    (F.cross_entropy(student(IMAGES[mine]), LABELS[mine]) + kd.loss(LABELS[mine])).backward()
    (Path(folder) / f"{rank}.done").touch()


def test_training_continues_after_the_process_group_is_destroyed():
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(disconnected, folder)
        assert len(list(Path(folder).glob("*.done"))) == 2


def refuse(tensor, src):
    raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")


def late(rank, folder, backends):
    """Attached before the process group exists, with other values; no KD loss in the first step."""
    torch.manual_seed(rank)
    if backends is not None:
        dist.get_backend_config = lambda: backends
        dist.broadcast = refuse
    student, teacher = Net(4), Net(6)
    point = KDPoint("last", targets=CodebookTargets(num_templates=4))
    kd = attach_kd(student, teacher, [point], losses=[FitNetLoss(at="first")], example=IMAGES[:2])
    mine = connected(rank)
    called = DistributedDataParallel(student)
    F.cross_entropy(called(IMAGES[mine]), LABELS[mine]).backward()
    kd.fit([(IMAGES[mine], LABELS[mine])], progress=False)
    (F.cross_entropy(called(IMAGES[mine]), LABELS[mine]) + kd.loss(LABELS[mine])).backward()
    torch.save([p.detach() for p in kd.parameters()], Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("backends", [None, "cuda:nccl"])
def test_parameters_are_broadcast_in_the_first_forward(backends):
    """Also where the backend takes no tensors of the CPU."""
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(late, folder, backends)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert all(map(torch.equal, *ranks))
