"""letKD in a loop with Hugging Face Accelerate: attach, prepare, register the handle, resume.

    python examples/frameworks/accelerate_loop.py --quick
    python examples/frameworks/accelerate_loop.py --quick --resume runs/accelerate_loop-quick/state

AEKT's loss shows how to train a loss that has parameters of its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import AEKTLoss, CodebookTargets, DecisionTargets, KDPoint, attach_kd, save_student

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

FIRST, LAST = "trunk_output.block3.block3-0", "trunk_output.block3"


def main() -> None:
    """Run one process of the training; Accelerate's launcher starts all of them."""
    options = data.options(__doc__)
    options.add_argument("--resume", metavar="DIR", help="folder written by save_state")
    args = options.parse_args()
    images, file = data.load(args), args.out / "teacher.pt"
    accelerator = Accelerator()
    teacher = regnet([1, 2, 2], [32, 64, 128], len(images.classes))
    if accelerator.is_main_process and not file.exists():
        train_teacher(teacher, images, 1 if args.quick else 4)
        torch.save(teacher.state_dict(), file)
    accelerator.wait_for_everyone()
    teacher.load_state_dict(torch.load(file, weights_only=True))
    teacher.to(accelerator.device)  # not by prepare: save_state would then store the teacher

    set_seed(0)
    student = regnet([1, 1, 2], [16, 32, 64], len(images.classes))
    points = [
        KDPoint(FIRST, targets=DecisionTargets(subclasses=2)),
        KDPoint(LAST, targets=CodebookTargets(32)),
    ]
    losses = [AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)]
    # Attach after Accelerator(), which connects the processes, and before optimiser and prepare.
    kd = attach_kd(student, teacher, points, losses=losses, example=images.example)
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True)
    loader = DataLoader(images.augmented, 50, shuffle=True, drop_last=True)
    plain = DataLoader(images.plain, 50)
    model, optimizer, loader, plain = accelerator.prepare(student, optimizer, loader, plain)
    accelerator.register_for_checkpointing(kd)  # targets, train-only parameters and the step
    if args.resume:
        accelerator.load_state(args.resume)
    kd.fit(plain, progress=accelerator.is_main_process)  # does nothing after load_state

    for epoch in range(args.epochs):
        model.train()
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) + kd.loss(y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, 5.0)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}, step {kd.step}: loss {loss.item():.3f}", flush=True)

    accelerator.save_state(args.out / "state")
    if accelerator.is_main_process:
        save_student(accelerator.unwrap_model(model), args.out / "student.pt")
    accelerator.end_training()


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0])


def train_teacher(model: nn.Module, images: data.Images, epochs: int) -> None:
    """Train with labels only."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(epochs):
        for x, y in DataLoader(images.augmented, 50, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


if __name__ == "__main__":
    main()
