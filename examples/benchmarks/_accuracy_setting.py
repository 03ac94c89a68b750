"""Describes a regime in words: title, teacher, students and training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import fill

from _accuracy_words import Line
from common.training import Recipe

NAMES = {"fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}
REFERENCES = ("labels only", "KD")


def first_line(runs: Mapping[str, Sequence[Line]]) -> Line:
    """A line to read data, teacher and common settings from, which all lines share."""
    return runs.get("labels only", next(iter(runs.values())))[0]


def title(line: Line) -> str:
    """The title of the regime."""
    recipe, taught = line["recipe"], line["teacher"]["recipe"]
    images = f"{recipe['images']:,} images" if recipe["images"] else "all training images"
    of = NAMES[taught["data"]] if taught.get("data", recipe["data"]) != recipe["data"] else ""
    names = f"{taught['network']}{f' of {of}' if of else ''} to {recipe['student']}"
    return f"{NAMES[recipe['data']]}, {names}, {images}, {recipe['epochs']} epochs"


def setting(lines: Sequence[Line], tuning: Sequence[Line] = ()) -> str:
    """The common recipe, the teacher, dates and versions, as a list in Markdown.

    Args:
        lines: the runs of the regime.
        tuning: the runs that the settings were chosen from.
    """
    line = next((line for line in lines if line["method"] == "labels only"), lines[0])
    recipe = line["recipe"]
    dates = sorted({line["date"] for line in lines})
    versions = sorted({f"{k} {v}" for line in lines for k, v in line["versions"].items()})
    views = recipe.get("views")
    forward = (
        f"was run once on {views} augmented views of each image. All students see these views; "
        "the seed determines the order"
        if views
        else "runs on the student's batches"
    )
    items = [
        f"**Teacher**: {teacher_text(line['teacher'])}",
        f"**Student**: {recipe['student']} with stages of {stages(recipe['width'])} channels"
        f"{size_of(lines)}. It sees {seen(recipe)}.",
        f"**Training**: {recipe['epochs']} epochs, batches of {recipe['batch_size']}, SGD with "
        f"Nesterov momentum 0.9, weight decay {recipe['weight_decay']:g} on all parameters. The "
        f"learning rate rises to {recipe['lr']:g} over a tenth of the steps, then falls to 0 by a "
        f"cosine. {augmentation(recipe)}. Training is in {recipe['precision']}, testing in "
        f"float32. The teacher, with folded batch norms, {forward}. It was trained with crops and "
        "flips.",
        f"**Validation**: {held_out(recipe, tuning)}.",
        f"**Run** {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {', '.join(versions)}.",
    ]
    return "\n".join(wrapped(item) for item in items)


def held_out(recipe: Recipe, tuning: Sequence[Line]) -> str:
    """What the validation images are."""
    if recipe["validation"]:
        return f"{recipe['validation']:,} training images that no student trains on"
    if not tuning:
        return "none; the settings are those of a regime with fewer images"
    chosen = tuning[0]["recipe"]
    return (
        f"none; the settings were chosen in runs of {chosen['epochs']} epochs that kept "
        f"{chosen['validation']:,} training images for validation"
    )


def teacher_text(teacher: Line) -> str:
    """The teacher's size, where it comes from, and its accuracy."""
    taught, test = teacher["recipe"], f"**{teacher['test_accuracy']:.2f} %** of the test images"
    size = f"{teacher['parameters']:,} parameters, {teacher['macs']:,} multiply-adds"
    if "file" in taught:
        data = NAMES[taught["data"]]
        source = f"{taught['network']} of {data}, weights from {taught['file']}"
        return f"{source}, {size}. It classifies {test} correctly."
    return (
        f"{taught['network']}, {size}, trained for {taught['epochs']} epochs on all training "
        "images except the validation images. "
        f"It classifies {test} correctly ({teacher['validation_accuracy']:.2f} % of the "
        "validation images, "
        f"{teacher['training_accuracy']:.2f} % of its training images)."
    )


def size_of(lines: Sequence[Line]) -> str:
    """Parameters and multiply-adds of the student without layers; empty if it was not run."""
    plain = next((x for x in lines if x["method"] in REFERENCES), None)
    if plain is None:
        return ""
    return f", {plain['parameters']:,} parameters, {plain['macs']:,} multiply-adds"


def wrapped(item: str) -> str:
    """A wrapped item of a list."""
    return fill(item, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def augmentation(recipe: Recipe) -> str:
    """The augmentation of the student's images."""
    crops = f"crops with {recipe['padding']} pixels of padding" if recipe["padding"] else ""
    flips = "flips" if recipe["flips"] else ""
    both = " and ".join(part for part in (crops, flips) if part)
    return f"The images are augmented with {both}" if both else "The images are not augmented"


def seen(recipe: Recipe) -> str:
    """The images that a student sees; 0 means all."""
    whose = "the same" if "draw" in recipe else "different ones"
    if not recipe["images"]:
        return "all training images"
    return f"{recipe['images']:,} images, the same number of each class, {whose} for each seed"


def stages(width: float) -> str:
    """Channels of the three stages."""
    return ", ".join(str(round(width * factor)) for factor in (1, 2, 4))
