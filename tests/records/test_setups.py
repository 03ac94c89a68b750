"""Training setups read records as they read the live teacher: each against it, on equal views."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from kdlayers import (
    CodebookTargets,
    FitNetLoss,
    KDLoss,
    KDPoint,
    RecordedTeacher,
    attach_kd,
    open_record,
)
from kdlayers.errors import RecordError
from tests.records.data import FlipAndCrop, Squares
from tests.records.test_files import contents
from tests.records.test_training import EXAMPLE, Net
from tests.two_ranks import connect, on_two_ranks

pytestmark = pytest.mark.slow

SETTINGS = {"views": 2, "dtype": "float32", "batch_size": 8}


def data():
    return Squares(32, transform=FlipAndCrop())


def attached(teacher=None, **options):
    """A student with a KD layer, a loss with a projector, and KD; always the same."""
    torch.manual_seed(0)
    made = Net(8)
    torch.manual_seed(1)
    losses = [FitNetLoss(at="first"), KDLoss(weight=lambda step: 1 / (1 + step))]
    points = [KDPoint("second", targets=CodebookTargets(6))]
    kd = attach_kd(Net(6), teacher or made, points, losses=losses, example=EXAMPLE)
    plain = Squares(32, size=8)
    if teacher is None:
        kd.fit([(plain.images, torch.arange(32) % 4)])
    return kd


def pair(tmp_path):
    """Two equal handles, and a record that the second reads."""
    live, kd = attached(), attached()
    return live, kd, kd.record(data(), tmp_path / "record", progress=False, **SETTINGS)


def parameters(kd):
    return [*kd.student.parameters(), *kd.parameters()]


def optimiser(kd):
    return torch.optim.SGD(parameters(kd), 0.05, momentum=0.9)


def batches(recorded, epochs=2, size=8):
    for epoch in range(epochs):
        recorded.set_epoch(epoch)
        yield from DataLoader(recorded, size)


def train(kd, recorded, steps, *, read, called=None, autocast=None, accumulate=1):
    """Losses of some steps; ``read``: whether the record is read or the teacher runs."""
    losses = []
    called = called or kd.student
    optimizer = optimiser(kd)
    for number, (x, y, key) in enumerate(batches(recorded)):
        if number == steps:
            break
        with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
            loss = F.cross_entropy(called(x), y)
            loss = loss + (kd.loss(y, recorded=key) if read else kd.loss(y))
        (loss / accumulate).backward()
        if (number + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def assert_same(live, kd):
    for mine, theirs in zip(parameters(kd), parameters(live), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_whole_trainings_with_a_schedule_are_those_of_the_live_teacher(accumulate, tmp_path):
    live, kd, recorded = pair(tmp_path)
    found = train(kd, recorded, 8, read=True, accumulate=accumulate)
    expected = train(live, recorded, 8, read=False, accumulate=accumulate)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert_same(live, kd)
    assert kd.step == live.step == 8
    assert float(kd.terms["KDLoss.weighted"] / kd.terms["KDLoss"]) == pytest.approx(1 / 8)


@pytest.mark.parametrize("recorded_in", ["float32", "bfloat16"])
def test_under_autocast(recorded_in, tmp_path):
    live, kd = attached(), attached()
    with torch.autocast("cpu", torch.bfloat16, enabled=recorded_in == "bfloat16"):
        recorded = kd.record(data(), tmp_path / "record", progress=False, **SETTINGS)
    found = train(kd, recorded, 8, read=True, autocast=torch.bfloat16)
    expected = train(live, recorded, 8, read=False, autocast=torch.bfloat16)
    # The teacher runs in bfloat16 in the loop; a record made outside autocast is more exact.
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=5e-2, atol=0)
    assert torch.equal(torch.stack(found), torch.stack(expected)) == (recorded_in == "bfloat16")


# torch.compile itself reads .grad of the tensors in a frame, with the warning hidden from users.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_students_and_losses(tmp_path):
    live, kd, recorded = pair(tmp_path)
    compiled = torch.compile(kd.student, backend="aot_eager")
    again = torch.compile(kd.loss, backend="aot_eager")
    for x, y, key in list(batches(recorded))[:3]:
        found = F.cross_entropy(compiled(x), y) + again(y, recorded=key)
        expected = F.cross_entropy(live.student(x), y) + live.loss(y)
        found.backward()
        expected.backward()
        torch.testing.assert_close(found, expected)
    for mine, theirs in zip(parameters(kd), parameters(live), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_resumed_training_is_an_undisturbed_one(tmp_path):
    live, kd, recorded = pair(tmp_path)
    steps = list(batches(recorded))

    def run(handle, part, optimizer, read):
        for x, y, key in part:
            loss = F.cross_entropy(handle.student(x), y)
            loss = loss + (handle.loss(y, recorded=key) if read else handle.loss(y))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    run(live, steps, optimiser(live), read=False)
    first = optimiser(kd)
    run(kd, steps[:3], first, read=True)
    saved = copy.deepcopy([kd.student.state_dict(), kd.state_dict(), first.state_dict()])
    kd.remove()
    # Another process: no teacher in memory, the record opened again.
    again = attached(RecordedTeacher(tmp_path / "record"))
    opened = open_record(tmp_path / "record", data())
    second = optimiser(again)
    for part, state in zip((again.student, again, second), saved, strict=True):
        part.load_state_dict(state)
    rest = list(batches(opened))[3:]
    for (x, _, key), (old, _, old_key) in zip(rest, steps[3:], strict=True):
        assert torch.equal(x, old)
        assert torch.equal(key, old_key)
    run(again, rest, second, read=True)
    assert_same(live, again)


def test_every_sample_of_every_view_has_its_own_mirror_image(tmp_path):
    _, kd, recorded = pair(tmp_path)
    teacher = kd._plan.teachers[0].model.eval()
    mirrored = 0
    for epoch in range(2):
        recorded.set_epoch(epoch)
        for index in range(32):
            image, _, key = recorded[index]
            said = recorded.reader.read([int(key[1])])["logits of all teachers"]
            with torch.no_grad():
                other = teacher(image.flip(-1)[None])
                torch.testing.assert_close(said, teacher(image[None]))
            assert not torch.allclose(said, other, rtol=1e-4, atol=1e-5)
            whole = recorded.dataset.images[index]
            crops = [whole[:, t : t + 8, m : m + 8] for t in range(5) for m in range(5)]
            mirrored += any(torch.equal(crop.flip(-1), image) for crop in crops)
    assert 16 < mirrored < 48  # half of 64, drawn at random


# ------------------------------------------------------------------ two processes


def eval_norms(kd):
    """Batch norm over part of a batch is another function; eval mode makes ranks comparable."""
    for module in kd.student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def two_ranks(rank, path, wrapper):
    connect(rank)
    kds = [attached(RecordedTeacher(path)), attached()]
    kds[0].load_state_dict(kds[1].state_dict())
    recorded = open_record(path, data())
    models = []
    for kd in kds:
        eval_norms(kd)
        if wrapper == "DDP":
            models.append(DistributedDataParallel(kd.student))
        else:
            from torch.distributed.fsdp import fully_shard

            models.append(fully_shard(kd.student, mesh=dist.init_device_mesh("cpu", (2,))))
    for epoch in range(2):
        recorded.set_epoch(epoch)
        sampler = DistributedSampler(recorded, seed=5)
        sampler.set_epoch(epoch)
        for x, y, key in DataLoader(recorded, 8, sampler=sampler):
            losses = []
            for kd, model in zip(kds, models, strict=True):
                kd.student.zero_grad()
                extra = {"recorded": key} if kd is kds[0] else {}
                loss = F.cross_entropy(model(x), y) + kd.loss(y, **extra)
                loss.backward()
                losses.append(loss.detach())
            assert torch.equal(*losses)
            for mine, theirs in zip(*map(parameters, kds), strict=True):
                grads = [g.full_tensor() if hasattr(g, "full_tensor") else g
                         for g in (mine.grad, theirs.grad)]  # fmt: skip
                assert torch.equal(*grads)


needs_processes = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@needs_processes
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_two_processes_get_the_live_teachers_gradients(wrapper, tmp_path):
    attached().record(data(), tmp_path / "record", progress=False, **SETTINGS)
    on_two_ranks(two_ranks, tmp_path / "record", wrapper)


def record_together(rank, path):
    connect(rank)
    kd = attached()
    batches = []
    kd._plan.teachers[0].model.register_forward_hook(lambda _, args, __: batches.append(args[0]))
    recorded = kd.record(data(), path, progress=False, **SETTINGS)
    assert [len(x) for x in batches] == [1, *[8] * 4]  # one for the shapes, half of 64 rows
    assert len(recorded) == 32


@needs_processes
def test_two_processes_write_the_bytes_of_one(tmp_path):
    attached().record(data(), tmp_path / "one", progress=False, **SETTINGS)
    on_two_ranks(record_together, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


class Gone(Squares):
    """A data set whose files are not on this machine."""

    def __getitem__(self, index):
        raise OSError("no such file")


def fail_together(rank, path):
    connect(rank)
    kd = attached()
    other = Squares(31 + rank, transform=FlipAndCrop())
    with pytest.raises(RecordError, match=r"rank 1 calls .* with another data set"):
        kd.record(other, f"{path}/other", progress=False, **SETTINGS)
    there = data() if rank == 0 else Gone(32, transform=FlipAndCrop())
    with pytest.raises(OSError if rank else RecordError, match="no such file"):
        kd.record(there, f"{path}/gone", progress=False, **SETTINGS)
    (kd.student if rank else kd._plan.teachers[0].model).fc.register_forward_hook(
        lambda _, __, out: out + float("nan") if len(out) > 1 else out
    )
    with pytest.raises(RecordError, match="rank 0 failed: the teacher gave NaN" if rank else "NaN"):
        kd.record(data(), f"{path}/nan", progress=False, **SETTINGS)


@needs_processes
def test_what_fails_on_one_process_is_an_error_on_all(tmp_path):
    on_two_ranks(fail_together, tmp_path)
