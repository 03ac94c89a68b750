"""The script of dense prediction: its data, its measures, and every method for a few steps."""

import json
import sys

import _shapes as sh
import dense_shapes
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score


def test_boxes_and_masks_are_of_the_same_shapes():
    data = sh.shapes(20, seed=3)
    again = sh.shapes(20, seed=3)
    assert torch.equal(data.images, again.images)
    for mask, boxes in zip(data.masks, data.boxes, strict=True):
        for kind in mask.unique()[1:].tolist():
            frames = boxes["boxes"][boxes["labels"] == kind]
            y, x = torch.where(mask == kind)
            inside = (frames[:, 0, None] <= x) & (x < frames[:, 2, None])
            inside &= (frames[:, 1, None] <= y) & (y < frames[:, 3, None])
            assert inside.any(0).all()


def test_mean_iou_is_scikit_learns():
    draw = torch.Generator().manual_seed(0)
    masks, found = (torch.randint(sh.CLASSES, (3, 8, 8), generator=draw) for _ in "ab")
    expected = jaccard_score(masks.flatten(), found.flatten(), average="macro")
    assert sh.mean_iou(found, masks) == pytest.approx(100 * expected)
    assert sh.mean_iou(masks, masks) == 100


def box(x, kind, score=None):
    entry = {"boxes": torch.tensor([[x, 0.0, x + 10, 10]]), "labels": torch.tensor([kind])}
    return entry if score is None else {**entry, "scores": torch.tensor([score])}


def joined(*boxes):
    return {key: torch.cat([b[key] for b in boxes]) for key in boxes[0]}


def test_average_precision_by_hand():
    true = [joined(box(0.0, 1), box(30.0, 1), box(0.0, 2), box(0.0, 3))]
    exact = [joined(*(box(x, k, 0.9) for x, k in ((0.0, 1), (30.0, 1), (0.0, 2), (0.0, 3))))]
    assert sh.average_precision(exact, true) == pytest.approx(100)
    # Of class 1: a hit, the same again, a miss, a hit; precisions 1 and 2/4 at the two recalls.
    found = [
        joined(
            box(1.0, 1, 0.9), box(2.0, 1, 0.8), box(50.0, 1, 0.7), box(31.0, 1, 0.6),
            box(0.0, 2, 0.9), box(40.0, 3, 0.9),
        )
    ]  # fmt: skip
    assert sh.average_precision(found, true) == pytest.approx(100 * (0.75 + 1 + 0) / 3)
    assert average_precision_score([1, 0, 0, 1], [0.9, 0.8, 0.7, 0.6]) == pytest.approx(0.75)


@pytest.mark.parametrize("task", dense_shapes.METHODS)
def test_every_method_runs(task, tmp_path, monkeypatch, capsys):
    out = tmp_path / "lines.jsonl"
    options = ["--seeds", "1", "--images", "10", "--steps", "2", "--teacher-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["x", task, *options, "--out", str(out)])
    monkeypatch.setattr(dense_shapes, "TEACHER_IMAGES", 20)
    monkeypatch.setattr(dense_shapes, "TEST_IMAGES", 20)
    dense_shapes.main()
    text = out.read_text("utf-8")
    assert capsys.readouterr().out == text
    lines = [json.loads(line) for line in text.splitlines()]
    models = 2 if task == "segmentation" else 1
    assert len(lines) == 1 + models * len(dense_shapes.METHODS[task])
    assert all(0 <= line["score"] <= 100 for line in lines)
