"""Two processes: an FSDP2 student is saved as a whole, and a DDP student pruned alike in both."""

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from kdlayers import KDPoint, attach_kd, load_student, prune_templates, save_student
from kdlayers._step.sites import slots
from tests.nets import Net, batch
from tests.two_ranks import connect, on_two_ranks

pytestmark = pytest.mark.slow
IMAGES, _ = batch(12)


def student():
    torch.manual_seed(0)
    model = Net(4)
    points = [KDPoint(name, num_templates=12, alpha=0.5) for name in ("first", "last")]
    kd = attach_kd(model, at=points, example=IMAGES)
    model(IMAGES)
    kd.detach()
    with torch.no_grad():
        for slot in slots(model).values():
            slot.norm.bias.copy_(torch.linspace(-6, 1, 12))
    return model.eval()


def worker(rank, folder):
    connect(rank)
    sharded = student()
    fully_shard(sharded.last)
    fully_shard(sharded)
    assert sharded.head.weight.to_local().shape != sharded.head.weight.shape
    # To a name of each rank's own, to see which one writes.
    save_student(sharded, f"{folder}/sharded{rank}.pt")
    wrapped = DistributedDataParallel(student())
    report = prune_templates(wrapped, [IMAGES[rank::2]])
    save_student(wrapped, f"{folder}/pruned{rank}.pt")
    torch.save([(layer.name, layer.after) for layer in report], f"{folder}/report{rank}.pt")


def test_two_processes(tmp_path):
    on_two_ranks(worker, tmp_path)
    assert {path.name for path in Path(tmp_path).glob("sharded*")} == {"sharded0.pt"}
    loaded = load_student(Net(4).eval(), tmp_path / "sharded0.pt")
    assert torch.equal(loaded(IMAGES), student()(IMAGES))
    # As one process does that sees the data of both.
    alone = student()
    after = [(layer.name, layer.after) for layer in prune_templates(alone, [IMAGES])]
    assert any(count < 12 for _, count in after)
    for rank in range(2):
        assert torch.load(tmp_path / f"report{rank}.pt", weights_only=True) == after
        pruned = load_student(Net(4).eval(), tmp_path / f"pruned{rank}.pt")
        assert torch.equal(pruned(IMAGES), alone(IMAGES))
