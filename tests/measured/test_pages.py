"""Numbers of the recipes, of speed and of Fashion-MNIST."""

import json
import re

import pytest

from tests.measured.committed import (
    DOCS,
    accuracies,
    cells,
    difference,
    lines,
    shown,
    text_of,
    verdict,
)

RECIPES = DOCS / "data" / "recipes"


@pytest.mark.parametrize(
    ("start", "task", "models"),
    [
        ("mean IoU, %", "segmentation", ["lraspp", "deeplab"]),
        ("AP at IoU 0.5, %", "detection", ["Faster R-CNN"]),
    ],
)
def test_the_tables_of_dense_prediction(start, task, models):
    found = [line for line in lines("recipes/dense-shapes.jsonl") if line["task"] == task]
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
    found, table = lines("recipes/label-free.jsonl"), cells("label-free.md", "accuracy, %")
    for model in ("untrained", "distilled"):
        runs = [line for line in found if line["model"] == model]
        assert {line["seed"] for line in runs} == {0, 1, 2}
        measures = ("k-NN", "linear", "fine-tuned")
        expected = [shown([run[measure] for run in runs]) for measure in measures]
        assert table[f"student, {model}"] == expected
    (teacher,) = (line for line in found if line["model"] == "teacher")
    assert table["teacher"][:2] == [shown([teacher[m]]) for m in ("k-NN", "linear")]


def test_what_the_page_says_of_several_labels():
    found = lines("recipes/several-labels.jsonl")
    students = [
        shown([line["mAP"] for line in found if line["model"] == model])
        for model in ("labels only", "BinaryKDLoss")
    ]
    (teacher,) = (line["mAP"] for line in found if line["model"] == "teacher")
    page = text_of("more-losses.md")
    assert f"precision of {teacher:.1f} %" in page
    assert "have {} % with labels only, and {} %".format(*students) in page


def test_the_table_of_the_quickstart():
    printed = (RECIPES / "quickstart.txt").read_text("utf-8")
    rows = cells("quickstart.md", "| test accuracy %")
    assert list(rows) == ["labels only", "KD", "letKD-2", "letKD-2 + KD"]
    for method, (accuracy, gain, size) in rows.items():
        (line,) = re.findall(rf"^{re.escape(method)} {{2,}}(.*)$", printed, re.M)
        shown_gain = gain or "+0.00 (+0.00 to +0.00)"
        assert line.split() == [*accuracy.split(), *shown_gain.split(), size]


def test_what_a_record_of_few_logits_loses():
    rows = cells("recorded.md", "| all logits")
    printed = [
        line.strip("| ") for line in (RECIPES / "topk.txt").read_text("utf-8").splitlines()[2:]
    ]
    name = {"DKDLoss": "DKDLoss, temperature 4"}
    for line, (shown_name, shown_cells) in zip(printed, rows.items(), strict=True):
        measured, *values = (cell.strip() for cell in line.split("|"))
        assert name.get(measured, measured) == shown_name.replace("`", "")
        assert values == shown_cells


def test_what_the_front_page_says_of_fashion_mnist():
    few = ("fashion-mnist-6000", "fashion-mnist-6000-resnet20", "fashion-mnist-6000-vgg")
    better = set()
    for stem in (*few, "fashion-mnist-all", "fashion-mnist-all-8"):
        runs = accuracies(stem)
        if stem in few:
            assert verdict(runs["letKD-2"], runs["layers only (2)"]) == 1
        same = [name for name in runs if name != "KD" and "wider" not in name]
        better |= {(stem, name) for name in same if verdict(runs[name], runs["KD"]) == 1}
    assert better == {("fashion-mnist-6000", "DKD")}
    text = text_of("README.md")
    assert "no method beats KD with the same student, except DKD with one of two" in text


def test_what_the_pages_of_fashion_mnist_say_of_dkd():
    for stem in ("fashion-mnist-6000-resnet20", "fashion-mnist-all-8", "fashion-mnist-all"):
        runs = accuracies(stem)
        assert verdict(runs["DKD"], runs["KD"]) == 0
        middle, low, high = (f"{x:.1f}" for x in difference(runs["DKD"], runs["KD"]))
        assert f"({middle} points, {low} to {high}" in text_of(f"results-{stem}.md")
    runs, page = accuracies("fashion-mnist-6000"), text_of("results-fashion-mnist-6000.md")
    assert verdict(runs["DKD"], runs["KD"]) == 1
    middle, low, high = (f"{x:.1f}" for x in difference(runs["DKD"], runs["KD"]))
    assert f"better than KD**, by {middle} points ({low} to {high}, five seeds)" in page
    earlier = {}
    for run in lines("results/fashion-mnist-6000.earlier.jsonl"):
        earlier.setdefault(run["method"], {})[run["seed"]] = run["test_accuracy"]
    assert earlier.keys() == {"DKD", "AEKT chi2", "letKD-2 + DKD"}
    assert all(verdict(runs[name], before) == 0 for name, before in earlier.items())
    earlier = {run["seed"]: run for run in lines("results/fashion-mnist-all.earlier.jsonl")}
    before = {seed: run["test_accuracy"] for seed, run in earlier.items()}
    assert verdict(before, accuracies("fashion-mnist-all")["KD"]) == -1


def test_what_a_recorded_step_takes():
    file = DOCS / "data" / "performance" / "recorded_step.json"
    found = json.loads(file.read_text("utf-8"))["comparisons"]
    text = text_of("recorded.md")
    sentences = {
        "live teacher": "{} to {} of the time of the same step with the live teacher",
        "in memory": "{} to {} of the time of the step whose teacher's tensors are in memory",
    }
    for other, sentence in sentences.items():
        medians = [c["ratio"]["middle"] for c in found if c["alternative"] == other]
        assert len(medians) == 6
        assert sentence.format(f"{min(medians):.2f}", f"{max(medians):.2f}") in text
