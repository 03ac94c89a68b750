"""Two processes on one machine: gradients, train-only parameters and fits are synchronised."""

import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kdlayers import CodebookTargets, DecisionTargets, DistillLoss, KDPoint, attach_kd
from kdlayers._step.sites import slots
from kdlayers.errors import AttachError
from tests.nets import Net, batch
from tests.two_ranks import connect, on_two_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]


class Projected(DistillLoss):
    """A loss with a parameter of its own, drawn at random on each rank."""

    def build(self, student, teacher):
        self.matrix = nn.Parameter(torch.randn(student.shape[1], student.shape[1]))

    def forward(self, student, teacher, targets=None):
        return (student @ self.matrix - teacher).square().mean()


def build(images, rank=0):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    torch.rand(rank)  # what attach_kd draws differs from rank to rank
    # Batch norm over part of a batch is another function; eval mode makes ranks comparable.
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    kd = attach_kd(student, teacher, points, losses=[Projected()], example=images[:2])
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.eval()
    return student, kd


def one_step(called, student, kd, images, labels, accumulate=1):
    optimiser = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.1)
    parts = zip(images.chunk(accumulate), labels.chunk(accumulate), strict=True)
    for number, (x, y) in enumerate(parts, start=1):
        waits = number < accumulate and hasattr(called, "no_sync")
        with called.no_sync() if waits else nullcontext():
            loss = F.cross_entropy(called(x), y) + kd.loss(y)
            (loss / accumulate).backward()
    grads = [p.grad.clone() for p in [*student.parameters(), *kd.parameters()]]
    optimiser.step()
    return grads


def worker(rank, folder, find_unused, accumulate, late):
    images, labels = batch(12)
    mine = slice(rank, None, 2)
    student, kd = build(images, rank) if late else (None, None)
    connect(rank)
    if not late:
        student, kd = build(images, rank)
    # Fit sees this rank's half; one process sees all.
    kd.fit([(images[mine], labels[mine])])
    with pytest.raises(AttachError, match="call attach_kd"):
        attach_kd(DistributedDataParallel(Net(4)), Net(6), "last", example=images[:2])
    wrapped = DistributedDataParallel(Net(4))
    late_kd = attach_kd(wrapped.module, Net(6), "last", example=images[:2])
    with pytest.raises(AttachError, match="does not hold the parameters of the student's KD"):
        wrapped(images[mine])
    late_kd.remove()
    called = DistributedDataParallel(student, find_unused_parameters=find_unused)
    grads = one_step(called, student, kd, images[mine], labels[mine], accumulate)
    states = kd.state_dict()["losses"]
    torch.save({"grads": grads, "losses": states}, Path(folder) / f"{rank}.pt")


def sharded_worker(rank, folder, granularity):
    from torch.distributed.fsdp import fully_shard

    connect(rank)
    images, labels = batch(12)
    mine = slice(rank, None, 2)
    student, kd = build(images)
    kd.fit([(images[mine], labels[mine])])
    mesh = dist.init_device_mesh("cpu", (2,))
    if granularity == "each part":
        for part in (*slots(student).values(), student.first, student.last):
            fully_shard(part, mesh=mesh)
    fully_shard(student, mesh=mesh)
    with pytest.raises(AttachError, match="wrapped in FSDP already"):
        attach_kd(student, Net(6), "last", example=images[:2])
    logits = student(images[mine])
    loss = F.cross_entropy(logits, labels[mine]) + kd.loss(labels[mine])
    loss.backward()
    grads = {name: p.grad.full_tensor() for name, p in student.named_parameters()}
    grads |= {f"loss {i}": p.grad for i, p in enumerate(kd.parameters())}
    torch.save(grads, Path(folder) / f"{rank}.pt")


@pytest.mark.parametrize("granularity", ["whole", "each part"])
def test_fully_sharded_students_have_the_gradients_of_one_process(granularity):
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(sharded_worker, folder, granularity)
        sharded = torch.load(Path(folder) / "0.pt", weights_only=True)
    images, labels = batch(12)
    student, kd = build(images)
    kd.fit([(images, labels)])
    (F.cross_entropy(student(images), labels) + kd.loss(labels)).backward()
    whole = {name: p.grad for name, p in student.named_parameters()}
    whole |= {f"loss {i}": p.grad for i, p in enumerate(kd.parameters())}
    assert list(whole) == list(sharded)
    for name, grad in whole.items():
        torch.testing.assert_close(
            sharded[name], grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("find_unused", "accumulate", "late"),
    [(False, 1, False), (True, 1, False), (False, 3, False), (False, 1, True)],
)
def test_two_processes_equal_one_on_the_whole_batch(find_unused, accumulate, late):
    with tempfile.TemporaryDirectory() as folder:
        on_two_ranks(worker, folder, find_unused, accumulate, late)
        ranks = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    for a, b in zip(ranks[0]["grads"], ranks[1]["grads"], strict=True):
        assert torch.equal(a, b)
    for name, state in ranks[0]["losses"].items():
        for key, value in state.items():
            assert torch.equal(value, ranks[1]["losses"][name][key]), (name, key)
    images, labels = batch(12)
    student, kd = build(images)
    kd.fit([(images, labels)])
    whole = kd.state_dict()["losses"]
    for name in ("TemplateLoss.first", "TemplateLoss.last"):
        for key, value in whole[name].items():
            torch.testing.assert_close(
                value, ranks[0]["losses"][name][key], msg=lambda m, n=name, k=key: f"{n} {k}: {m}"
            )
    grads = one_step(student, student, kd, images, labels)
    for mine, theirs in zip(grads, ranks[0]["grads"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_slots_are_found_through_wrapped_names():
    student, _ = build(batch(12)[0])
    assert list(slots(student)) == ["first", "last"]
