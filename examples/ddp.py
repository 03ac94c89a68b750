"""letKD on several processes with DistributedDataParallel, in your own loop.

    torchrun --nproc-per-node 2 examples/ddp.py --quick     # NCCL on GPUs, gloo otherwise

AEKT's loss shows how to train a loss that has parameters of its own.
"""

from __future__ import annotations

import data
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import AEKTLoss, CodebookTargets, DecisionTargets, KDPoint, attach_kd, save_student

FIRST, LAST = "trunk_output.block3.block3-0", "trunk_output.block3"


def main() -> None:
    """Run one process of the training; torchrun starts all of them."""
    args = data.options(__doc__).parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    images = data.load(args)
    classes, first = len(images.classes), dist.get_rank() == 0
    teacher = regnet([1, 2, 2], [32, 64, 128], classes).to(device)
    file = args.out / "teacher.pt"
    if first and not file.exists():
        train_teacher(teacher, images, 1 if args.quick else 4, device)
        torch.save(teacher.state_dict(), file)
    dist.barrier()
    teacher.load_state_dict(torch.load(file, map_location=device, weights_only=True))

    torch.manual_seed(dist.get_rank())  # attach_kd and DDP copy rank 0's weights to every rank
    student = regnet([1, 1, 2], [16, 32, 64], classes).to(device)
    points = [
        KDPoint(FIRST, targets=DecisionTargets(subclasses=2)),
        KDPoint(LAST, targets=CodebookTargets(32)),
    ]
    losses = [AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)]
    # Attach after init_process_group, and before DistributedDataParallel and the optimiser.
    kd = attach_kd(student, teacher, points, losses=losses, example=images.example)
    model = DistributedDataParallel(student, device_ids=[device] if cuda else None)
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True)
    # Each rank reads its shard of the plain images; all ranks get the same fitted targets.
    sampler = DistributedSampler(images.plain, shuffle=False)
    kd.fit(DataLoader(images.plain, 50, sampler=sampler), progress=first)

    sampler = DistributedSampler(images.augmented, drop_last=True)
    loader = DataLoader(images.augmented, 50, sampler=sampler, drop_last=True)
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        model.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(model(x), y) + kd.loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if first:
            print(f"epoch {epoch}: loss {loss.item():.3f}", flush=True)
    if first:
        # Save the unwrapped student: no key begins with "module.", and the teacher is left out.
        save_student(student, args.out / "student.pt")
        state = {"student": student.state_dict(), "kd": kd.state_dict()}
        fresh = args.out / "checkpoint.new"  # replaces the old file only when complete
        torch.save(state | {"optimizer": optimizer.state_dict()}, fresh)
        fresh.replace(args.out / "checkpoint.pt")
    dist.destroy_process_group()


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0])


def train_teacher(model: nn.Module, images: data.Images, epochs: int, device: torch.device) -> None:
    """Train with labels only."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in DataLoader(images.augmented, 50, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
