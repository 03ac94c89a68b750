"""A regime in words: its title, its teacher, its students, how they were trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill
from typing import Any

from _accuracy_words import Line

Recipe = dict[str, Any]
NAMES = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
REFERENCES = ("labels only", "KD")


def first_line(runs: Mapping[str, Sequence[Line]]) -> Line:
    """The line that stands for all: they share data, teacher and what students have in common."""
    return runs.get("labels only", next(iter(runs.values())))[0]


def title(line: Line) -> str:
    """What the regime is."""
    recipe, taught = line["recipe"], line["teacher"]["recipe"]
    images = f"{recipe['images']:,} images" if recipe["images"] else "all training images"
    of = NAMES[taught["data"]] if taught.get("data", recipe["data"]) != recipe["data"] else ""
    names = f"{taught['network']}{f' of {of}' if of else ''} to {recipe['student']}"
    return f"{NAMES[recipe['data']]}, {names}, {images}, {recipe['epochs']} epochs"


def setting(lines: Sequence[Line]) -> str:
    """The recipe that all share, the teacher, dates and versions, as text."""
    line = next((line for line in lines if line["method"] == "labels only"), lines[0])
    recipe = line["recipe"]
    dates = sorted({line["date"] for line in lines})
    versions = sorted({f"{k} {v}" for line in lines for k, v in line["versions"].items()})
    views = recipe.get("views")
    forward = (
        f"was run once on {views} augmented views of every image, which are what all students of "
        "all methods and seeds see, in an order of their seed"
        if views
        else "runs on the student's batches"
    )
    items = [
        f"**Teacher**: {teacher_text(line['teacher'])}",
        f"**Student**: {recipe['student']} with stages of {stages(recipe['width'])} channels"
        f"{size_of(lines)}. It sees {seen(recipe)}.",
        f"**Training**: {recipe['epochs']} epochs, batches of {recipe['batch_size']}, SGD with "
        f"Nesterov's momentum 0.9, weight decay {recipe['weight_decay']:g} on all parameters, rate "
        f"{recipe['lr']:g} after a rise over a tenth of the steps, then falling to 0 by a cosine; "
        f"{augmentation(recipe)}; {recipe['precision']} in training, float32 in testing. "
        f"The teacher, its batch norms folded, {forward}; it has learnt with crops and flips.",
        f"**Validation**: {recipe['validation']:,} training images that no student trains on.",
        f"**Seconds** of an epoch, on {line['device']}, have "
        f"{'reading the record' if views else 'augmentation and the forward of the teacher'} in "
        "them, and not `kd.fit`, once before. On a CPU they are process CPU time of one "
        "thread, which other work on the machine lengthens less than the clock.",
        f"**Run** {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {', '.join(versions)}.",
    ]
    return "\n".join(wrapped(item) for item in items)


def teacher_text(teacher: Line) -> str:
    """The teacher's size, where it comes from, and its accuracy."""
    taught, test = teacher["recipe"], f"**{teacher['test_accuracy']:.2f} %** of the test images"
    size = f"{teacher['parameters']:,} parameters, {teacher['macs']:,} multiply-adds"
    if "file" in taught:
        data = NAMES[taught["data"]]
        return f"{taught['network']} of {data}, weights from {taught['file']}, {size}: {test}."
    return (
        f"{taught['network']}, {size}, {taught['epochs']} epochs on all but the validation images: "
        f"{test} ({teacher['validation_accuracy']:.2f} % of the validation images, "
        f"{teacher['training_accuracy']:.2f} % of its own)."
    )


def size_of(lines: Sequence[Line]) -> str:
    """Parameters and multiply-adds of the student without layers, where it was run."""
    plain = next((x for x in lines if x["method"] in REFERENCES), None)
    if plain is None:
        return ""
    return f", {plain['parameters']:,} parameters, {plain['macs']:,} multiply-adds"


def wrapped(item: str) -> str:
    """An entry of a list."""
    return fill(item, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def augmentation(recipe: Recipe) -> str:
    """What is done to the student's images."""
    crops = f"crops with {recipe['padding']} pixels of padding" if recipe["padding"] else ""
    flips = "flips" if recipe["flips"] else ""
    return " and ".join(part for part in (crops, flips) if part) or "no augmentation"


def seen(recipe: Recipe) -> str:
    """Which images a student sees; 0 stands for all."""
    whose = "the same" if "draw" in recipe else "others"
    if not recipe["images"]:
        return "all training images"
    return f"{recipe['images']:,} images, equally many of every class, {whose} for every seed"


def stages(width: float) -> str:
    """Channels of the three stages."""
    return ", ".join(str(round(width * factor)) for factor in (1, 2, 4))
