"""The cost of KD layers at inference, and how far folding, pruning and compiling reduce it.

The benchmark runs students with two KD layers (letKD-2) on random images, in eval mode: as trained,
folded, pruned and compiled. How many templates can be pruned depends on the training; here a share
of them is silenced by hand (`--silent`). A folded layer is also compared with two plain 1x1
convolutions of the same size: C to K and K to C channels, without bias.
"""

from __future__ import annotations

import argparse
import os

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _cases import Case, make_networks
from _tables import Report, Table, command_line, read, settings
from _timing import Step, alternate, digits, peak_memory, ratio, spread
from torch import nn

from kdlayers import KDPoint, attach_kd, fold, prune_templates

CASES = {
    "ResNet-20, 32x32": Case("cifar", 2, (32, 32), 64, 64, 4096, points=("layer3.0", "layer3")),
    "ResNet-18, 224x224": Case(
        "resnet", 2, (224, 224), 512, 512, 4096, points=("layer4.0", "layer4")
    ),
}
QUICK = {"ResNet-20, 16x16": Case(
    "cifar", 2, (16, 16), 64, 64, 64, 10, points=("layer3.0", "layer3")
)}  # fmt: skip
# Channels, size (height and width), templates.
LAYERS = ((64, 8, 4096), (512, 7, 4096), (192, 14, 1024))
VARIANTS = ("student", "with KD layers", "folded", "pruned", "pruned and folded")
COMPILED = ("student, compiled", "with KD layers, compiled", "folded, compiled")


def main() -> None:
    """Measure what the command line asks for."""
    parser = command_line(__doc__, rounds=15)
    parser.add_argument("--silent", type=float, default=0.5, metavar="SHARE",
        help="share of the templates that never fire; default: 0.5")  # fmt: skip
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    args = read(parser)
    report = Report("inference", "KD layers at inference", settings(args))
    variants = (*VARIANTS, *(COMPILED if can_compile(args) else ()))
    for name, case in (QUICK if args.quick else CASES).items():
        students(report, name, case, variants, args)
    layers_alone(report, args)
    report.save(args.out)


def can_compile(args: argparse.Namespace) -> bool:
    """Whether to measure torch.compile; prints a message if it does not work here."""
    if args.no_compile:
        return False
    try:
        torch.compile(torch.relu)(torch.ones(8, device=args.device))
    except Exception as error:  # the error depends on what is missing
        print(f"torch.compile does not work here and is skipped: {type(error).__name__}")
        return False
    return True


def students(
    report: Report, name: str, case: Case, variants: tuple[str, ...], args: argparse.Namespace
) -> None:
    """Latency, memory and parameters of every form of a student."""
    batches = (1, 4) if args.quick else (1, 64)
    times = {}
    for batch in batches:
        print(f"{name}, batch {batch} ...", flush=True)
        key = f"{name}, batch {batch}"
        torch.compiler.reset()  # the forms of a model share a cache, which is small
        steps = {v: forward(case, v, batch, args.silent, args.device) for v in variants}
        times[batch] = report.times_ms[key] = alternate(steps, args.rounds, device=args.device)
    key = f"{name}, batch {batches[-1]}"
    if not args.no_memory:
        report.memory_mib[key] = {
            v: peak_memory(forward, case, v, batches[-1], args.silent, args.device,
                           device=args.device)
            for v in variants if v not in COMPILED
        }  # fmt: skip
    rows = []
    for v in variants:
        row = [v, f"{parameters(case, v, args.silent):,}"]
        for batch in batches:
            slower = ratio(times[batch][v], times[batch]["student"])
            text = "1"
            if v != "student":
                text = report.compare(f"{name}, batch {batch}", "time", v, "student", slower)
            row += [f"{spread(times[batch][v])}", text]
        rows.append([*row, more_memory(report, key, v)])
    heads = [head for batch in batches for head in (f"batch {batch}, ms", "of student")]
    columns = ("variant", "numbers held", *heads, "more MiB than student")
    pruned = f"{args.silent:.0%} of the templates were silenced by hand before pruning."
    report.add(Table(name, columns, rows, f"Numbers held: parameters and buffers. {pruned}"))


def more_memory(report: Report, key: str, variant: str) -> str:
    """Peak memory of the forward in MiB, minus that of the student without KD layers."""
    peaks = report.memory_mib.get(key, {})
    if peaks.get("student") is None or variant not in peaks:
        return "-"
    return digits(peaks[variant] - peaks["student"])


def model(case: Case, variant: str, silent: float) -> nn.Module:
    """The student in one of its forms, in eval mode."""
    torch.manual_seed(0)
    student, _, images = make_networks(case)
    student.eval()
    if not variant.startswith("student"):
        sizes = (case.subclasses * case.classes, case.templates)
        points = [KDPoint(p, num_templates=k) for p, k in zip(case.points, sizes, strict=True)]
        attach_kd(student, at=points, example=images).detach()
    if variant.startswith("pruned"):
        silence(student, silent)
        prune_templates(student, [images])
    return fold(student) if "folded" in variant else student


@torch.no_grad()
def silence(student: nn.Module, share: float) -> None:
    """Move the thresholds of the first templates so far that no score reaches them."""
    for module in student.modules():
        if isinstance(module, nn.BatchNorm1d):  # only KD layers have these
            module.bias[: round(share * module.num_features)] = -1e4


def parameters(case: Case, variant: str, silent: float) -> int:
    """Number of values in parameters and buffers; a folded layer has buffers only."""
    made = model(case, variant, silent)
    return sum(t.numel() for t in (*made.parameters(), *made.buffers()) if t.is_floating_point())


def forward(case: Case, variant: str, batch: int, silent: float, device: str) -> Step:
    """The forward of a batch of images, as a step."""
    made = model(case, variant, silent).to(device)
    images = torch.randn(batch, 3, *case.size, device=device)
    if variant in COMPILED:
        made = torch.compile(made, dynamic=False)
    return no_grad(made, images)


def no_grad(made: nn.Module, x: torch.Tensor) -> Step:
    """A forward in inference mode, as a step."""

    def step() -> None:
        with torch.inference_mode():
            made(x)

    return step


def layers_alone(report: Report, args: argparse.Namespace) -> None:
    """Compare the folded layer with two convolutions."""
    rows = []
    for channels, size, templates in ((8, 4, 32),) if args.quick else LAYERS:
        for batch in (1, 4) if args.quick else (1, 64):
            name = f"{channels}x{size}x{size}, {templates} templates, batch {batch}"
            print(f"{name} ...", flush=True)
            steps = layer_forms(channels, size, templates, batch, args.device)
            times = report.times_ms[name] = alternate(steps, args.rounds, device=args.device)
            against = ratio(times["folded"], times["two convolutions"])
            text = report.compare(name, "time", "folded", "two convolutions", against)
            rows.append([name, *(f"{spread(values)}" for values in times.values()), text])
    columns = ("layer", "KD layer, ms", "folded, ms", "two convolutions, ms", "folded of those")
    report.add(Table("One layer alone", columns, rows))


def layer_forms(
    channels: int, size: int, templates: int, batch: int, device: str
) -> dict[str, Step]:
    """A student that is only a KD layer, the same student folded, and two convolutions."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, size, size, device=device)
    student = nn.Sequential(nn.Identity()).eval().to(device)
    student.output_fmt = "NCHW"
    attach_kd(student, at=[KDPoint("0", num_templates=templates)], example=x).detach()
    convolutions = nn.Sequential(
        nn.Conv2d(channels, templates, 1, bias=False),
        nn.Conv2d(templates, channels, 1, bias=False),
    )
    forms = {"KD layer": student, "folded": fold(student), "two convolutions": convolutions}
    return {name: no_grad(form.eval().to(device), x) for name, form in forms.items()}


if __name__ == "__main__":
    main()
