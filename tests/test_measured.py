"""The tables of the pages on dense prediction and on label-free distillation show the data."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

import pytest

DOCS = Path(__file__).parents[1] / "docs"
DATA = DOCS / "data" / "recipes"


def lines(name):
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def shown(values):
    """Mean and standard deviation as the pages write them."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def cells(page, start):
    """Rows of the table whose header begins so, by their first cell."""
    text = (DOCS / page).read_text("utf-8")
    found = re.search(rf"^\| {re.escape(start)}.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.M)
    assert found, start
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize(
    ("start", "task", "models"),
    [
        ("mean IoU, %", "segmentation", ["lraspp", "deeplab"]),
        ("AP at IoU 0.5, %", "detection", ["Faster R-CNN"]),
    ],
)
def test_the_tables_of_dense_prediction(start, task, models):
    found = [line for line in lines("dense-shapes.jsonl") if line["task"] == task]
    students = [line for line in found if line["method"] != "teacher"]
    assert {line["seed"] for line in students} == {0, 1, 2}
    table = cells("dense.md", start)
    for method in dict.fromkeys(line["method"] for line in students):
        scores = [
            [x["score"] for x in students if x["method"] == method and x["model"] == model]
            for model in models
        ]
        assert [len(values) for values in scores] == [3] * len(models)
        assert table[method] == [shown(values) for values in scores]
    (teacher,) = (line for line in found if line["method"] == "teacher")
    assert table["the teacher"][-1] == shown([teacher["score"]])


def test_the_table_of_label_free_distillation():
    found, table = lines("label-free.jsonl"), cells("label-free.md", "accuracy, %")
    for model in ("untrained", "distilled"):
        runs = [line for line in found if line["model"] == model]
        assert {line["seed"] for line in runs} == {0, 1, 2}
        measures = ("k-NN", "linear", "fine-tuned")
        expected = [shown([run[measure] for run in runs]) for measure in measures]
        assert table[f"student, {model}"] == expected
    (teacher,) = (line for line in found if line["model"] == "teacher")
    assert table["teacher"][:2] == [shown([teacher[m]]) for m in ("k-NN", "linear")]
