"""The papers' recipes from end to end, for two epochs, on random images."""

import json
import math
import os
import pickle
import re
import subprocess
import sys

import cifar100
import iekd_cifar10
import imagenet
import pytest
import torch
from _cifar100 import PAIRS, network
from _methods import Pair, Taps
from _train import digest
from common import training
from common.teachers import load_teacher
from common.testing import parameters
from torchvision.datasets import CIFAR10
from torchvision.transforms.functional import normalize, to_pil_image

from kdlayers import load_student
from tests.examples import EXAMPLES
from tests.examples.recipe_teachers import theirs

SMALL = ["--num-templates", "16", "--subclasses", "2", "--components", "8"]


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A pair that trains in a second, and a file with its teacher's weights."""
    taps = Taps()
    numbers = {"teacher": 50.0, "letkd-2": 40.0}
    pair = Pair("resnet8", "resnet8", (taps, taps), lr=0.05, beta=2.0, published=numbers)
    monkeypatch.setitem(PAIRS, "tiny", pair)
    torch.save(theirs("resnet8")[1], tmp_path / "teacher.pth")
    return ["--pair", "tiny", "--teacher-checkpoint", str(tmp_path / "teacher.pth")]


def run(script, tmp_path, *options):
    """The result of a run on random images."""
    script.main(["--stand-in", "100", "--epochs", "2", "--out", str(tmp_path), *options])
    (result,) = tmp_path.glob("*/result.json")
    return json.loads(result.read_text("utf-8"))


@pytest.mark.parametrize("method", cifar100.METHODS)
def test_cifar100_runs_every_method(method, tiny, tmp_path, capsys):
    line = run(cifar100, tmp_path, *tiny, *SMALL, "--batch-size", "50", "--method", method)
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1]) == line
    assert "random images instead of cifar100: the accuracies mean nothing" in output
    assert line["data"] == "100 random images"
    assert (line["pair"], line["method"], line["epochs"]) == ("tiny", method, 2)
    assert 0 <= line["accuracy"] <= line["top5"] <= 100
    assert line["fit_seconds"] >= 0
    layers = {"letkd-1": 1, "letkd-2": 2, "layers": 2}.get(method, 0)
    assert line["parameters"] - parameters(network("resnet8")) == (
        (2 * 64 * 16 + 2 * 16 + 2) * (layers > 0) + (2 * 64 * 200 + 402) * (layers > 1)
    )
    saved = tmp_path / f"tiny-{method}-0" / "student.pt"
    if layers:
        load_student(network("resnet8"), saved)
    else:
        network("resnet8").load_state_dict(torch.load(saved, weights_only=True)["model"])


def test_a_stopped_run_goes_on_exactly(tiny, tmp_path, monkeypatch, capsys):
    options = [*tiny, *SMALL, "--batch-size", "50"]
    whole = run(cifar100, tmp_path / "whole", *options)
    loss = training.Training.loss

    def stop(self, batch):
        if self.epoch == 1:
            raise KeyboardInterrupt
        return loss(self, batch)

    with monkeypatch.context() as context:
        context.setattr(training.Training, "loss", stop)
        with pytest.raises(KeyboardInterrupt):
            run(cifar100, tmp_path / "parts", *options)
    parts = run(cifar100, tmp_path / "parts", *options)
    assert "resuming after epoch 1" in capsys.readouterr().out
    keys = ("accuracy", "top5", "recipe")
    assert [parts[key] for key in keys] == [whole[key] for key in keys]
    states = [
        torch.load(tmp_path / name / "tiny-letkd-2-0" / "checkpoint.pt", weights_only=True)
        for name in ("whole", "parts")
    ]
    for ours, same in zip(*(state["model"].values() for state in states), strict=True):
        assert torch.equal(ours, same)
    with pytest.raises(SystemExit, match=r"has another recipe .sizes.sharpness 1.0, now 2.0."):
        run(cifar100, tmp_path / "parts", *options, "--sharpness", "2")


def test_the_script_trains_its_teacher(tiny, tmp_path, capsys):
    options = [*tiny[:2], "--batch-size", "50", "--method", "kd", "--teacher-epochs", "1"]
    with pytest.raises(SystemExit, match=r"no weights for the teacher resnet8.*--train-teacher"):
        run(cifar100, tmp_path, *options)
    run(cifar100, tmp_path, *options, "--train-teacher", "--test-every", "1")
    assert "epoch 1 of 1: loss" in capsys.readouterr().out
    line = run(cifar100, tmp_path, *options)  # the teacher and the student are there
    teacher = network("resnet8")
    load_teacher(teacher, "resnet8", tmp_path / "teacher-resnet8.pt")
    assert line["recipe"]["teacher"]["weights"] == digest(teacher)


def test_a_diverged_run_says_so(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "optimise", lambda *_: {"cross-entropy": math.nan})
    with pytest.raises(SystemExit, match="the loss is nan in epoch 1: training diverged"):
        run(cifar100, tmp_path, *tiny, "--batch-size", "50", "--method", "labels")


@pytest.mark.slow
def test_a_published_pair_runs(tmp_path):
    pair = "resnet56-resnet20"
    file = tmp_path / "teacher.pth"
    torch.save(theirs(PAIRS[pair].teacher)[1], file)
    options = [*SMALL, "--pair", pair, "--teacher-checkpoint", str(file), "--batch-size", "50"]
    line = run(cifar100, tmp_path, *options)
    assert line["published"]["letkd-2"] == PAIRS[pair].published["letkd-2"]


@pytest.mark.parametrize("method", ["iekd", "kd", "labels"])
def test_iekd_on_cifar10_runs(method, tmp_path, monkeypatch):
    monkeypatch.setattr(iekd_cifar10, "BATCH", 50)
    monkeypatch.setattr(iekd_cifar10, "TEACHER", "resnet14")
    monkeypatch.setattr(iekd_cifar10, "STUDENT", "resnet8")
    file = tmp_path / "teacher.pth"
    torch.save(network("resnet14", 10).state_dict(), file)
    options = ["--teacher-checkpoint", str(file), "--fit-epochs", "2", "--method", method]
    line = run(iekd_cifar10, tmp_path, *options)
    assert line["recipe"]["lr"] == 0.1
    assert line["recipe"]["milestones"] == [1, 2]
    assert line["recipe"]["ce_weight"] == (0.05 if method == "kd" else 1.0)
    assert line["parameters"] == parameters(network("resnet8", 10))


def coloured(root):
    """Class folders with 10 and 4 pictures of ten classes, in two formats; returns all as bytes."""
    made = {}
    for part, count in (("train", 10), ("test", 4)):
        rows = []
        for label, name in enumerate("abcdefghij"):
            folder, kind = root / part / name, "bmp" if label % 2 else "png"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = 20 * label + torch.randint(56, (3, 32, 32))
                to_pil_image(pixels.byte()).save(folder / f"{index}.{kind}")
                rows.append(pixels.byte())
        made[part] = torch.stack(rows), torch.arange(10).repeat_interleave(count)
    return made


def test_cifar_from_class_folders_and_from_torchvisions_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(iekd_cifar10, "BATCH", 20)
    monkeypatch.setattr(iekd_cifar10, "STUDENT", "resnet8")
    made = coloured(tmp_path / "folders")
    files = tmp_path / "files" / "cifar-10-batches-py"
    files.mkdir(parents=True)
    stored = {"train": [f"data_batch_{n}" for n in range(1, 6)], "test": ["test_batch"]}
    for part, names in stored.items():
        images, labels = (value.chunk(len(names)) for value in made[part])
        for name, rows, own in zip(names, images, labels, strict=True):
            content = {"data": rows.flatten(1).numpy(), "labels": own.tolist()}
            (files / name).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda _: None)
    lines, weights = [], []
    for layout in ("folders", "files", "folders"):
        out = tmp_path / f"out-{layout}"
        options = ["--epochs", "4", "--method", "labels", "--device", "cpu", "--out", str(out)]
        iekd_cifar10.main(["--root", str(tmp_path / layout), *options])
        (result,) = out.glob("*/result.json")
        lines.append(json.loads(result.read_text("utf-8")))
        weights.append(torch.load(result.with_name("student.pt"), weights_only=True)["model"])
    assert capsys.readouterr().out.count("decoding 100 images") == 1  # they are kept
    assert lines[0]["data"] == "cifar10"
    assert lines[0]["accuracy"] == lines[1]["accuracy"]
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key])
    student = network("resnet8", 10)
    student.load_state_dict(weights[0])
    images, labels = made["test"]
    means = [125.3 / 255, 123.0 / 255, 113.9 / 255], [63.0 / 255, 62.1 / 255, 66.7 / 255]
    right = student.eval()(normalize(images / 255, *means)).argmax(1) == labels
    assert lines[0]["accuracy"] == pytest.approx(100 * right.double().mean().item())


def test_cifar_that_is_not_there(tmp_path):
    message = r"cifar10 is not in .*cifar-10-batches-py.*--download.*train/CLASS/IMAGE"
    with pytest.raises(SystemExit, match=message):
        iekd_cifar10.main(["--root", str(tmp_path), "--out", str(tmp_path)])


IMAGENET = ["--stand-in", "24", "--classes", "6", "--size", "32", "--epochs", "2", *SMALL[:4]]
IMAGENET += ["--components", "5", "--batch-size", "12", "--workers", "0"]
IMAGENET += ["--teacher-weights", "random", "--device", "cpu"]


@pytest.mark.parametrize(
    ("pair", "method"),
    [
        ("resnet34-resnet18", "letkd-2"),
        pytest.param("resnet50-mobilenet_v1", "letkd-2", marks=pytest.mark.release),
        ("resnet50-mobilenet_v2", "quest"),
    ],
)
def test_imagenet_runs(pair, method, tmp_path):
    imagenet.main([*IMAGENET, "--out", str(tmp_path), "--pair", pair, "--method", method])
    (result,) = tmp_path.glob("*/result.json")
    line = json.loads(result.read_text("utf-8"))
    assert (line["pair"], line["method"], line["data"]) == (pair, method, "24 random images")
    assert line["recipe"]["milestones"] == [1, 1, 2]


@pytest.mark.slow
def test_imagenet_runs_on_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [
        "--master-port",
        "0",
        "--standalone",
        str(EXAMPLES / "recipes" / "imagenet.py"),
        *IMAGENET,
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["recipe"]["processes"] == 2
    assert done.stdout.count("epoch 2 of 2") == 1


def test_imagenet_from_folders(tmp_path):
    for split, count in (("train", 8), ("val", 2)):
        for label in ("n01", "n02", "n03"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
                to_pil_image(pixels).save(folder / f"{index}.png")
    options = ["--root", str(tmp_path), "--out", str(tmp_path / "runs"), "--method", "labels"]
    imagenet.main([*IMAGENET[4:], *options])
    (result,) = tmp_path.glob("runs/*/result.json")
    line = json.loads(result.read_text("utf-8"))
    assert line["data"] == "imagenet"
    assert line["parameters"] < 11.2e6  # three classes instead of a thousand


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "no ImageNet folder"),
        (["--root", "nowhere"], "there is no nowhere/train"),
        (["--stand-in", "5", "--classes", "6"], "an image per class: 6, not 5"),
        (
            ["--stand-in", "6", "--classes", "6", "--teacher-weights", "V9"],
            "V9 is neither a file nor the name of weights of resnet34; the names are .'IMAGENET1K",
        ),
        (["--stand-in", "6", "--classes", "6"], "has 1000 classes, but the images have 6"),
    ],
)
def test_imagenet_says_what_is_missing(options, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        imagenet.main([*options, "--out", str(tmp_path), "--workers", "0", "--device", "cpu"])


@pytest.mark.parametrize("script", ["cifar100", "imagenet", "iekd_cifar10"])
def test_help_names_every_pair_and_method(script, capsys):
    with pytest.raises(SystemExit) as left:
        {"cifar100": cifar100, "imagenet": imagenet, "iekd_cifar10": iekd_cifar10}[script].main(
            ["--help"]
        )
    assert left.value.code == 0
    # A narrow terminal breaks lines at hyphens.
    words = re.findall(r"[\w-]+", re.sub(r"-\s+(?=\w)", "-", capsys.readouterr().out))
    wanted = {
        "cifar100": [*PAIRS, *cifar100.METHODS],
        "imagenet": [*imagenet.PAIRS, *imagenet.METHODS],
        "iekd_cifar10": ["--teacher-checkpoint", "--fit-epochs", "--stand-in"],
    }
    assert [word for word in wanted[script] if word not in words] == []
