"""Counts how much of the library a training step enters: files, functions, calls, changes of file.

Uses `sys.setprofile` to count the functions of kdlayers that `student(x)`, `kd.loss(y)` and
`kd.fit` enter, on a ResNet-18 with two KD points and `KDLoss`. A comprehension counts as a part of
its function.

    python examples/benchmarks/profile_step.py          # counts
    python examples/benchmarks/profile_step.py --list   # also lists every function, by file
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torchvision.models import resnet18

import kdlayers
from kdlayers import CodebookTargets, DecisionTargets, KDHandle, KDLoss, KDPoint, attach_kd

PACKAGE = str(Path(kdlayers.__file__).parent)
INNER = ("<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>")  # 3.12 inlines most of them


@dataclass
class Entered:
    """The functions of kdlayers that a call entered, and how often it called each."""

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    changes: int = 0  # calls from one file of kdlayers, or from outside, into another

    @property
    def files(self) -> list[str]:
        """Files, with paths relative to the package."""
        return sorted({file for file, _ in self.calls})

    @property
    def functions(self) -> int:
        """Number of different functions."""
        return len(self.calls)


def profile(call: Callable[[], object]) -> Entered:
    """Run ``call`` and count the functions that it enters."""
    found = Entered()

    def note(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(PACKAGE) or code.co_name in INNER:
            return
        found.calls[
            code.co_filename[len(PACKAGE) + 1 :], getattr(code, "co_qualname", code.co_name)
        ] += 1
        above = frame.f_back
        found.changes += above is None or above.f_code.co_filename != code.co_filename

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def make() -> tuple[torch.nn.Module, KDHandle, torch.Tensor, torch.Tensor]:
    """A ResNet-18 that learns from another one, at two points and from its logits."""
    torch.manual_seed(0)
    student, teacher = resnet18(num_classes=4), resnet18(num_classes=4)
    points = [
        KDPoint("layer3", targets=DecisionTargets(2, components=3)),
        KDPoint("layer4", targets=CodebookTargets(16)),
    ]
    x, y = torch.randn(16, 3, 64, 64), torch.arange(16) % 4
    return student, attach_kd(student, teacher, points, losses=[KDLoss()], example=x[:2]), x, y


def measure() -> dict[str, Entered]:
    """The counts of `kd.fit`, and of the two parts of the third training step."""
    student, kd, x, y = make()
    found = {"kd.fit(loader)": profile(lambda: kd.fit([(x, y)], progress=False))}
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.01)
    for _ in range(2):  # the first steps do some work only once
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(student(x), y) + kd.loss(y)
        loss.backward()
        optimizer.step()
    return {
        "student(x)": profile(lambda: student(x)),
        "kd.loss(y)": profile(lambda: kd.loss(y)),
        **found,
    }


def main() -> None:
    """Print the table and, with --list, the functions."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="print every function, by file")
    args = parser.parse_args()
    rows = measure()
    print(f"{'':16}{'files':>8}{'functions':>11}{'calls':>8}{'changes of file':>17}")
    for name, row in rows.items():
        counts = f"{len(row.files):8}{row.functions:11}{row.calls.total():8}{row.changes:17}"
        print(f"{name:16}{counts}")
    if args.list:
        for name, row in rows.items():
            print(f"\n{name}")
            for file in row.files:
                names = [f"{n} x{c}" for (where, n), c in row.calls.items() if where == file]
                print(f"  {file}: {', '.join(names)}")


if __name__ == "__main__":
    main()
