"""Runs on CIFAR: their lines, runs that go on, and a teacher of other classes."""

import json
import multiprocessing
from pathlib import Path

import pytest
from common import files, training

from tests.benchmark_modules import load
from tests.examples.cifar import OPTIONS

accuracy = load("accuracy")


def test_recorded_runs_have_full_lines(bench, tmp_path):
    names = ["labels only", "KD", "AT", "letKD-2", "layers only (2)", "wider, same MACs"]
    lines = bench(tmp_path / "runs.jsonl", "--seeds", "0", "--methods", *names)
    assert [line["method"] for line in lines] == names
    for line in lines:
        assert line["recipe"]["views"] == 2
        assert line["recipe"]["draw"] == 0
        assert line["teacher"]["recipe"]["data"] == "cifar100"
        assert len(line["curve"]) == 3
        assert line["pruned"] == []
        assert all(0 <= line[f"{part}_accuracy"] <= 100 for part in ("training", "test"))
    layers = lines[3]["recipe"]["layers"]
    assert [layer.get("templates", layer.get("subclasses")) for layer in layers] == [1, 8]
    assert lines[3]["parameters"] == lines[4]["parameters"]
    # The mean over an epoch's batches: it has fallen on colours that tell the classes apart.
    assert lines[0]["curve"][-1]["cross-entropy"] < lines[0]["curve"][0]["cross-entropy"]


def test_all_images_can_be_trained_on(bench, tmp_path, capsys):
    options = ("--images", "0", "--validation", "0", "--views", "1", "--seeds", "0")
    (line,) = bench(tmp_path / "tiny.jsonl", *options, "--methods", "labels only")
    assert line["validation_accuracy"] is None
    assert 0 <= line["test_accuracy"] <= 100
    page = " ".join(load("report").pages(tmp_path)["results-tiny.md"].split())
    assert "It sees all training images." in page
    assert "**Validation**: none;" in page
    with pytest.raises(SystemExit):
        bench(tmp_path / "tuning.jsonl", *options, "--tuning")
    assert "pass --validation N" in capsys.readouterr().err


def test_accuracy_against_the_number_of_views(bench, tmp_path):
    options = ("--methods", "KD", "--seeds", "0", "1", "2")
    usual = bench(tmp_path / "tiny.jsonl", *options)
    file = tmp_path / "tiny.views.jsonl"
    bench(file, *options, "--views", "1")
    lines = bench(file, *options, "--views", "live")
    assert [line["recipe"].get("views") for line in lines] == [1, 1, 1, None, None, None]
    assert len({line["recipe_hash"] for line in (*usual, *lines)}) == 3
    for one, live in zip(lines[:3], lines[3:], strict=True):
        assert one["recipe"] == live["recipe"] | {"views": 1}
        assert one["curve"] != live["curve"]
    page = load("report").pages(tmp_path)["results-tiny.md"]
    _, _, section = page.partition("## How many recorded views?")
    rows = [row for row in section.splitlines() if row.startswith("| KD |")][:3]
    assert [row.split(" | ")[1] for row in rows] == ["1", "2", "live"]
    for row, own in zip(rows, (lines[:3], usual, lines[3:]), strict=True):
        scores = [line["test_accuracy"] for line in own]
        assert f"| 3 | {sum(scores) / 3:.2f} ± " in row
    gap = load("_accuracy_words").gap
    live = [line["test_accuracy"] for line in lines[3:]]
    text, _ = gap([line["test_accuracy"] for line in lines[:3]], live)
    assert text in rows[0]
    # A run that differs in more than its views is not in the table.
    by_views = load("_accuracy_views").by_views
    other = lines[0] | {"recipe": lines[0]["recipe"] | {"lr": 0.5}}
    assert by_views([other], usual) == {}
    with pytest.raises(SystemExit):
        bench(file, *options, "--views", "-1")


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("method", ["letKD-2 + KD", "IE-KD", "AEKT chi2", "AT"])
def test_a_killed_run_goes_on_after_its_last_epoch(method, bench, tmp_path, monkeypatch, capsys):
    options = ("--seeds", "4", "--methods", method)
    (whole,) = bench(tmp_path / "whole.jsonl", *options)
    save, fit = training.Training._save, accuracy.KDHandle.fit
    fits = []

    def kill(self):
        save(self)
        if self.epoch == 2:
            raise Killed

    monkeypatch.setattr(training.Training, "_save", kill)
    with pytest.raises(Killed):
        bench(tmp_path / "parts.jsonl", *options)
    monkeypatch.setattr(training.Training, "_save", save)
    monkeypatch.setattr(accuracy.KDHandle, "fit", lambda *args, **kw: fits.append(fit(*args, **kw)))
    (resumed,) = bench(tmp_path / "parts.jsonl", *options)
    assert "resuming after epoch 2" in capsys.readouterr().out
    assert fits == []  # the targets are those of before, nothing is fitted again
    for key in ("test_accuracy", "training_accuracy", "last_terms", "curve", "scales", "probes"):
        assert resumed[key] == whole[key]


def test_what_another_process_does_is_left_to_it(tmp_path):
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()

    def hold():
        with files.claimed(tmp_path / "lock") as mine:
            if mine:
                begun.set()
                end.wait(60)

    other = context.Process(target=hold)
    other.start()
    assert begun.wait(60)
    with files.claimed(tmp_path / "lock") as mine:
        assert not mine
    end.set()
    other.join()
    with files.claimed(tmp_path / "lock") as mine:
        assert mine


def test_a_teacher_of_other_classes(bench, tmp_path, root, checkpoint, cache):
    """Ten classes of their own, 40 images of them drawn by the seed, and losses on features."""
    folder = tmp_path / "cifar10"
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for label in range(10):
            place = Path(root) / part / f"class{label:03}"
            (folder / part / str(label)).symlink_to(place, target_is_directory=True)
    options = [*OPTIONS, "--regime", "cifar10-500", "--root", str(folder), "--cache", str(tmp_path)]
    options += ["--validation", "4", "--images", "20", "--batch-size", "10", "--components", "5"]
    options += ["--teacher-data", "cifar100", "--teacher-root", str(root)]
    out = tmp_path / "out.jsonl"
    accuracy.main(
        [*options, "--teacher-checkpoint", str(checkpoint), "--out", str(out), "--seeds", "0", "1"]
    )
    lines = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    methods = load("_accuracy_regimes").REGIMES["cifar10-500"]["methods"]
    assert [line["method"] for line in lines] == methods * 2
    assert len(list(tmp_path.glob("record-*"))) == 2  # other images for every seed
    assert {line["teacher"]["recipe"]["data"] for line in lines} == {"cifar100"}
