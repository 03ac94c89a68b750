"""letKD on several processes with DistributedDataParallel, in a loop of one's own.

torchrun --nproc-per-node 2 examples/ddp.py --quick     (GPUs and NCCL where there are any)
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from itertools import islice

import torch
import torch.distributed as dist
import torch.nn.functional as F
from _digits import EXAMPLE, SIZES, Parser, accuracy, digits, losses, points, trained_teacher
from _models import make_student
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kdlayers import attach_kd, save_student


def main() -> None:
    """One of the processes."""
    options = Parser(__doc__, "ddp")
    options.add_argument("--accumulate", type=int, default=1, help="batches per step; default: 1")
    args = options.parse_args()
    device = start()
    images = digits(args.quick)
    if dist.get_rank() == 0:
        trained_teacher(images, args)
    dist.barrier()
    teacher = trained_teacher(images, args).to(device)

    torch.manual_seed(dist.get_rank())  # DDP and attach_kd hand round what rank 0 has drawn
    student = make_student(*SIZES).to(device)
    # After init_process_group, before DistributedDataParallel, before the optimiser.
    kd = attach_kd(student, teacher, points(), losses=losses(), example=EXAMPLE)
    model = DistributedDataParallel(student, device_ids=[device] if device.type == "cuda" else None)
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, nesterov=True)
    # Each rank brings its part of the plain images; all of them get the same targets.
    kd.fit(part_of(images.plain, args.batch_size, shuffle=False), progress=dist.get_rank() == 0)

    loader = part_of(images.augmented, args.batch_size, shuffle=True)
    steps = len(loader) // args.accumulate * args.accumulate
    for epoch in range(args.epochs):
        loader.sampler.set_epoch(epoch)
        model.train()
        for index, (x, y) in enumerate(islice(loader, steps), 1):
            x, y = x.to(device), y.to(device)
            update = index % args.accumulate == 0
            with nullcontext() if update else model.no_sync():
                loss = F.cross_entropy(model(x), y) + kd.loss(y)
                (loss / args.accumulate).backward()
            if update:
                optimizer.step()
                optimizer.zero_grad()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: {accuracy(student, images):.2f} %", flush=True)

    apart = torch.stack([(p.detach() - from_rank_0(p)).abs().max() for p in parameters]).max()
    dist.all_reduce(apart, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        print(f"parameters differ by {apart.item()} at most from one rank to another")
        # The student inside the wrapper: no key begins with "module.", and no teacher is in it.
        save_student(student, args.out / "student.pt")
        state = {"student": student.state_dict(), "kd": kd.state_dict()}
        fresh = args.out / "checkpoint.new"  # a stopped run keeps the checkpoint before
        torch.save(state | {"optimizer": optimizer.state_dict()}, fresh)
        fresh.replace(args.out / "checkpoint.pt")
    dist.destroy_process_group()


def start() -> torch.device:
    """Join the other processes; the device of this one."""
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def part_of(data: Dataset, size: int, *, shuffle: bool) -> DataLoader:
    """This rank's part of ``data``, in batches."""
    sampler = DistributedSampler(data, shuffle=shuffle)
    return DataLoader(data, size, sampler=sampler, drop_last=shuffle)


def from_rank_0(parameter: torch.Tensor) -> torch.Tensor:
    """The values that rank 0 has."""
    values = parameter.detach().clone()
    dist.broadcast(values, src=0)
    return values


if __name__ == "__main__":
    main()
