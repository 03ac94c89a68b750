"""Your own loop with two models of timm (`pip install timm`): letKD-1 and KD, resume, deploy.

python examples/own_loop.py                # digits, in a few minutes
python examples/own_loop.py --data DIR     # your images: DIR/train/CLASS/, DIR/val/CLASS/
python examples/own_loop.py --resume       # resumes from the last checkpoint
"""

from __future__ import annotations

from pathlib import Path

import data
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kdlayers import CodebookTargets, KDLoss, KDPoint, attach_kd, bake, find_points, save_student

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Train a student and export it as a program that needs neither kdlayers nor timm."""
    options = data.options(__doc__)
    options.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    args = options.parse_args()
    images = data.load(args)
    teacher = trained_teacher(images, args.out / "teacher.pt", 1 if args.quick else 5)
    torch.manual_seed(0)
    student = make("resnet10t", images, channels=(16, 32, 64, 128))
    print(find_points(student, images.example.to(DEVICE)))
    # The student's last stage learns from the teacher's, although their channels differ.
    points = [KDPoint("layer4", "s4", targets=CodebookTargets(64))]
    losses = [KDLoss(temperature=4.0)]
    kd = attach_kd(student, teacher, points, losses=losses, example=images.example)
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    parts = {"student": student, "kd": kd, "optimizer": optimizer, "schedule": schedule}
    checkpoint = args.out / "checkpoint.pt"
    if args.resume:
        saved = torch.load(checkpoint, map_location=DEVICE, weights_only=True)
        for name, state in saved.items():
            parts[name].load_state_dict(state)
    kd.fit(DataLoader(images.plain, 50))  # does nothing after load_state_dict
    loader = DataLoader(images.augmented, 50, shuffle=True, drop_last=True)
    for epoch in range(schedule.last_epoch, args.epochs):
        student.train()
        for x, y in loader:
            x, y = x.to(DEVICE), y.to(DEVICE)
            loss = F.cross_entropy(student(x), y) + kd.loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
        torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
        terms = {name: round(value.item(), 3) for name, value in kd.terms.items()}
        print(f"epoch {epoch}: {terms}", flush=True)

    kd.detach()
    print(f"student: {accuracy(student, images.test):.2f} %")
    save_student(student, args.out / "student.pt")  # load_student(model, file) needs no teacher
    program = torch.export.export(bake(student.eval()), (images.example[:1].to(DEVICE),))
    torch.export.save(program, args.out / "student.pt2")


def make(name: str, images: data.Images, **options: object) -> nn.Module:
    """A timm model. With an output stride of 8, small images still give several positions."""
    options |= {"num_classes": len(images.classes), "output_stride": 8}
    return timm.create_model(name, **options).to(DEVICE)


def trained_teacher(images: data.Images, file: Path, epochs: int) -> nn.Module:
    """Load the teacher; train it first if there is no file. Put your own teacher here."""
    teacher = make("regnetx_002", images)
    if not file.exists():
        optimizer = torch.optim.AdamW(teacher.parameters(), 1e-3)
        for _ in range(epochs):
            for x, y in DataLoader(images.augmented, 50, shuffle=True, drop_last=True):
                optimizer.zero_grad()
                F.cross_entropy(teacher(x.to(DEVICE)), y.to(DEVICE)).backward()
                optimizer.step()
        torch.save(teacher.state_dict(), file)
    teacher.load_state_dict(torch.load(file, map_location=DEVICE, weights_only=True))
    print(f"teacher: {accuracy(teacher, images.test):.2f} %")
    return teacher


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Percentage of images whose class has the largest logit."""
    model.eval()
    right = [(model(x.to(DEVICE)).argmax(1).cpu() == y) for x, y in DataLoader(images, 250)]
    return 100 * torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
