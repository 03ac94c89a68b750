"""Training, fitting and deployment on a GPU; skipped without one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    DKDLoss,
    FeatureLoss,
    KDLoss,
    KDPoint,
    attach_kd,
    fold,
    load_student,
    save_student,
)
from tests.nets import Net, batch, losses_of_steps

IMAGES, LABELS = batch(12)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    # torch.compile itself reads .grad of the tensors in a frame.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


def attached(memory="normal", shard=False):
    """A student on the GPU and its fitted handle, with two layers and two losses."""
    torch.manual_seed(0)
    student, teacher = Net(4).cuda().train(), Net(6).cuda()
    points = [
        KDPoint("first", targets=DecisionTargets(2, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    losses = [KDLoss(), FeatureLoss(at="last")]
    kd = attach_kd(student, teacher, points, losses=losses, memory=memory, example=IMAGES)
    if shard:
        fully_shard(student)
    kd.fit([(IMAGES, LABELS)], progress=False)
    return student, kd


def on_gpu():
    return IMAGES.cuda(), LABELS.cuda()


def test_training_with_float16_and_a_grad_scaler_learns():
    student, kd = attached()
    x, y = on_gpu()
    optimizer = SGD([*student.parameters(), *kd.parameters()], lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024)
    found = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(student(x), y) + kd.loss(y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        found.append(loss.item())
    assert found[-1] < 0.9 * found[0]
    assert scaler.get_scale() >= 1024  # no step was skipped


@pytest.mark.parametrize("compiled", ["student", "loss"])
def test_compiled_steps_equal_eager_ones(compiled):
    torch._dynamo.reset()
    (student, kd), (other, theirs) = attached(), attached()
    theirs.load_state_dict(kd.state_dict())
    x, y = on_gpu()
    forward = torch.compile(other) if compiled == "student" else other
    distil = torch.compile(theirs.loss) if compiled == "loss" else theirs.loss
    for _ in range(3):
        wanted = F.cross_entropy(student(x), y) + kd.loss(y)
        found = F.cross_entropy(forward(x), y) + distil(y)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
        wanted.backward()
        found.backward()
    for ours, own in zip(other.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, own.grad, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_step_can_be_captured_in_a_cuda_graph(memory):
    (student, kd), (twin, theirs) = attached(memory), attached(memory)
    theirs.load_state_dict(kd.state_dict())
    x, y = on_gpu()
    captured = SGD([*student.parameters(), *kd.parameters()], lr=0.05, momentum=0.9)
    eager = SGD([*twin.parameters(), *theirs.parameters()], lr=0.05, momentum=0.9)

    def step(model, handle, optimizer):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y) + handle.loss(y)
        loss.backward()
        optimizer.step()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(student, kd, captured)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    captured.zero_grad()
    with torch.cuda.graph(graph):
        loss = step(student, kd, captured)
    wanted = [step(twin, theirs, eager).item() for _ in range(8)]
    found = []
    for _ in range(5):
        graph.replay()
        found.append(loss.item())
    assert found == pytest.approx(wanted[3:], rel=2e-3)


def test_fits_are_as_good_as_on_the_cpu():
    rows = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    images = rows.view(40, 100, 16).movedim(2, 1).reshape(40, 16, 10, 10)
    labels = torch.arange(40) % 4

    def fitted(device):
        model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Flatten(), torch.nn.LazyLinear(4))
        model(images)
        student = torch.nn.Sequential(
            torch.nn.Conv2d(16, 16, 1), torch.nn.Flatten(), torch.nn.LazyLinear(4)
        )
        student(images)
        targets = CodebookTargets(8)
        kd = attach_kd(
            student.to(device),
            model.to(device),
            [KDPoint("0", targets=targets)],
            example=images,
        )
        kd.fit(DataLoader(TensorDataset(images, labels), 8), seed=1, progress=False)
        centers = targets.state_dict()["centers"].cpu().double()
        return torch.cdist(rows.double(), centers).square().amin(1).mean().item()

    assert fitted("cuda") == pytest.approx(fitted("cpu"), rel=0.03)


def test_a_saved_student_gives_the_same_logits_on_the_cpu(tmp_path):
    student, kd = attached()
    losses_of_steps(student, kd, *on_gpu(), steps=3)
    kd.detach()
    save_student(student.eval(), tmp_path / "student.pt")
    loaded = Net(4)
    load_student(loaded, tmp_path / "student.pt")
    with torch.no_grad():
        wanted = student(IMAGES.cuda()).cpu()
        torch.testing.assert_close(loaded.eval()(IMAGES), wanted, rtol=1e-3, atol=1e-3)


def test_a_folded_student_gives_the_same_logits():
    student, kd = attached()
    losses_of_steps(student, kd, *on_gpu(), steps=3)
    kd.detach()
    student.eval()
    with torch.no_grad():
        wanted = student(IMAGES.cuda())
        fold(student)
        torch.testing.assert_close(student(IMAGES.cuda()), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_one_rank_of_nccl_equals_no_rank(wrap):
    x, y = on_gpu()
    wanted = losses_of_steps(*attached(), x, y, steps=4)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        student, kd = attached(shard=wrap == "FSDP2")
        if wrap == "DDP":
            student = DistributedDataParallel(student, device_ids=[0])
        found = losses_of_steps(student, kd, x, y, steps=4)
    finally:
        dist.destroy_process_group()
    assert found == pytest.approx(wanted, rel=1e-3)


def test_the_loss_is_the_same_after_a_move_to_the_cpu_and_back():
    student, kd = attached()
    x, y = on_gpu()
    student(x)
    wanted = kd.loss(y).item()
    student.cpu()
    student(IMAGES)
    assert kd.loss(LABELS).item() == pytest.approx(wanted, rel=1e-3)
    student.cuda()
    student(x)
    assert kd.loss(y).item() == pytest.approx(wanted, rel=1e-3)


def test_low_memory_has_a_lower_peak():
    peaks = {}
    for memory in ("normal", "low"):
        torch.manual_seed(0)
        student, teacher = Net(4).cuda().train(), Net(6).cuda()
        points = [KDPoint("last", targets=CodebookTargets(512))]
        x = torch.randn(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)).cuda()
        y = torch.arange(16, device="cuda") % 3
        kd = attach_kd(student, teacher, points, losses=[DKDLoss()], memory=memory)
        kd.fit([(x, y)], progress=False)
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            student(x)
            kd.loss(y).backward()
        peaks[memory] = torch.cuda.max_memory_allocated() - before
    assert peaks["low"] < peaks["normal"]
