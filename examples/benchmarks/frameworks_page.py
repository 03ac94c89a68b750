"""Writes the table of docs/frameworks.md, with lines counted on the pages and measured times.

`python examples/benchmarks/frameworks_page.py docs`
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from _tables import measured_on
from _timing import Spread

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# For each script: page, name of the diff, features that its tests switch on, benchmark.
SCRIPTS = (
    ("timm `train.py`", "timm-train.md", "timm_train",
     "mixup, CutMix, smoothing, EMA, AMP, accumulation, clipping, checkpointing, layer decay, "
     "`torch.compile`, resume", "timm train.py"),
    ("torchvision `references/classification`", "torchvision.md", "torchvision_classification",
     "mixup, CutMix, smoothing, EMA, AMP, clipping, decay of norms, resume",
     "torchvision classification"),
    ("torchvision `references/segmentation`", "torchvision.md", "torchvision_segmentation",
     "auxiliary loss, ignored pixels, resume", "torchvision segmentation"),
    ("torchvision `references/detection`", "torchvision.md", "torchvision_detection",
     "images of several sizes, resume", "torchvision detection"),
    ("transformers `run_image_classification.py`", "hf-trainer.md", "hf_trainer",
     "smoothing, bf16, evaluation, best model, resume", "transformers Trainer"),
    ("transformers `..._no_trainer.py`", "accelerate.md", "hf_no_trainer",
     "bf16, accumulation, resume", "Accelerate"),
    ("accelerate `cv_example.py`", "accelerate.md", "cv_example",
     "frozen base, OneCycleLR, bf16", "Accelerate"),
    ("a LightningModule", "lightning.md", "lightning_module",
     "validation, EMAWeightAveraging, resume", "Lightning"),
)  # fmt: skip


def main() -> None:
    """Write the table between the two marks."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("docs", type=Path, nargs="?", default=Path("docs"), help="folder of pages")
    docs = parser.parse_args().docs
    page = docs / "frameworks.md"
    text = page.read_text("utf-8")
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    page.write_text(text[:start] + "\n" + table(docs) + "\n" + text[end:], "utf-8")


def lines(docs: Path, page: str, name: str) -> int:
    """The number of lines that the page's diff adds or changes."""
    text = (docs / page).read_text("utf-8")
    found = re.search(rf"^<!-- {name} -->\n```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"{page} has no diff called {name}")
    return sum(line.startswith("+") for line in found.group(1).splitlines())


def table(docs: Path) -> str:
    """The table, and the machine it was measured on."""
    report = json.loads((docs / "data/frameworks/frameworks.json").read_text("utf-8"))
    ratios = {}
    for c in report["comparisons"]:
        ratios[c["case"], c["ours"], c["alternative"]] = str(Spread(**c["ratio"]))
    rows = [
        "| script | lines | features that were on | time of a step / a step of the script "
        "| / a step of its own distillation |",
        "|---|---|---|---|---|",
    ]
    for script, page, name, features, case in SCRIPTS:
        whole = [
            f"{ours}: {value}"
            for (known, ours, other), value in ratios.items()
            if known == case and other == "as it is" and ours != "its own distillation"
        ]
        own = ratios.get((case, "KDLoss", "its own distillation"), "has none")
        cells = [f"[{script}]({page}) <!-- {name} -->", str(lines(docs, page, name)), features]
        cells += ["; ".join(whole) or "not measured", own if case else "has none"]
        rows.append("| " + " | ".join(cells) + " |")
    where = measured_on(report["machine"]).removesuffix(".")
    rounds = report["settings"]["rounds"]
    note = (
        f"{where}. Median and quartiles of {rounds} rounds, CPU time, small models and images, on "
        "a machine that also did other work, so the ratios are rough. Every distilled step "
        "includes the teacher's forward, whose share depends on the two models. Both scripts on "
        "Accelerate have the same step. For Lightning, ten steps and the trainer's start.  "
        "\n`python examples/benchmarks/frameworks.py "
        f"{report['settings']['options']}`"
    )
    return "\n".join([*rows, "", note])


if __name__ == "__main__":
    main()
