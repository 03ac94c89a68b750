"""Published accuracies of a pair of networks, for comparison with ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _accuracy_words import Line, plus_minus, table

# CIFAR-100, ResNet-56 to ResNet-20, mean of five trials: A. Gorgun et al., BMVC 2023, supplement,
# table 1, which quotes its baselines from other papers.
RESNET56_RESNET20 = {
    "teacher": 72.34,
    "labels only": 69.06,
    "KD": 70.66,
    "FitNet": 69.21,
    "AT": 70.55,
    "DKD": 71.97,
    "QuEST": 71.84,
    "letKD-1": 72.44,
    "letKD-2": 73.27,
}
PUBLISHED = {("cifar100", "resnet56", "resnet20"): RESNET56_RESNET20}


def published_of(line: Line) -> dict[str, float]:
    """The published accuracies for the data and networks of a line; empty if there are none."""
    pair = (line["recipe"]["data"], line["teacher"]["recipe"]["network"], line["recipe"]["student"])
    same_data = line["teacher"]["recipe"].get("data") == line["recipe"]["data"]
    return PUBLISHED.get(pair, {}) if same_data else {}


def published_table(runs: Mapping[str, Sequence[Line]]) -> str:
    """Published numbers next to ours, and how the settings differ; empty if there are none."""
    line = next(iter(runs.values()))[0]
    known = published_of(line)
    if not known:
        return ""
    recipe, base = line["recipe"], known["KD"]
    images = f"{recipe['images']:,}" if recipe["images"] else "all"
    teacher = line["teacher"]["test_accuracy"]
    rows = [["teacher", f"{known['teacher']:.2f}", "", f"{teacher:.2f}"]]
    for name, value in known.items():
        if name != "teacher":
            ours = [x["test_accuracy"] for x in runs.get(name, ())]
            shown = plus_minus(ours) if ours else "not run yet"
            rows.append(
                [name, f"{value:.2f}", f"{value - base:+.2f}" if name != "KD" else "", shown]
            )
    note = (
        "Published: A. Gorgun et al., BMVC 2023, supplement, table 1 (five trials): 240 epochs on "
        "all 50,000 images, new augmentation in each epoch, K = 4096, 8 sub-classes, batches of "
        "64; evaluated on the test images after every epoch. Ours: the last of "
        f"{recipe['epochs']} epochs on {images} images, with another teacher and other weights. "
        "Neither the accuracies nor the differences can be compared."
    )
    return f"{note}\n\n{table(('', 'published %', 'minus KD', 'ours %'), rows)}"
