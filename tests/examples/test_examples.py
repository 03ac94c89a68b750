"""The examples are short, complete in themselves, and run; what they print is finite."""

import ast
import importlib
import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch

from kdlayers import load_student
from tests.examples import EXAMPLES

SCRIPTS = sorted(file for file in EXAMPLES.glob("*.py") if file.name != "data.py")
FRAMEWORKS = sorted((EXAMPLES / "frameworks").glob("*.py"))
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d+(?:e[-+]?\d+)?|nan|inf)\b", re.IGNORECASE)

# What each prints: names in front of an accuracy, and terms that it logs.
PRINTED = {
    "letkd2": (
        ["teacher", "letKD-2", "labels only", "loaded and baked"],
        ["TemplateLoss.trunk_output.block3"],
    ),
    "iekd": (
        ["teacher", "IE-KD", "labels only"],
        ["IE-KD", "IE-KD.inheritance", "IE-KD.exploration"],
    ),
    "skd": (
        ["teacher", "student-friendly KD", "labels only"],
        ["SKD", "SKD.entropy", "SKD.agreement"],
    ),
    "aekt": (
        ["teacher", "AEKT", "labels only"],
        ["AEKT", "AEKT.target", "AEKT.others", "AEKT.adaptive"],
    ),
    "mutual": (
        [f"{name}, seed {seed}" for name in ("labels only", "DML", "IE-DML") for seed in (0, 1)],
        ["MutualLoss", "total"],
    ),
}


def run(name, folder, *options):
    """The output of an example with ``--quick``, in a folder of its own."""
    command = [sys.executable, "-W", "error::UserWarning", str(EXAMPLES / f"{name}.py"), "--quick"]
    done = subprocess.run(
        [*command, *map(str, options)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", params=PRINTED)
def example(request, tmp_path_factory):
    """Name, output and folder of an example."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run(request.param, folder), folder


def test_accuracies_are_printed(example):
    name, output, _ = example
    for row in PRINTED[name][0]:
        found = re.search(rf"^{re.escape(row)}: (\d+\.\d\d) %", output, re.M)
        assert found is not None, f"{row} in {output}"
        assert 0 <= float(found[1]) <= 100


def test_every_term_is_logged_and_finite(example):
    name, output, _ = example
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert len(lines) == (2 if name == "mutual" else 1)
    for line in lines:
        terms = ast.literal_eval(line.partition(": ")[2])
        assert set(PRINTED[name][1]) <= set(terms), line
        assert all(math.isfinite(value) for value in terms.values()), line
    assert all(math.isfinite(float(number)) for number in NUMBER.findall(output))


def test_the_saved_student_is_the_trained_one(example):
    name, output, folder = example
    if name != "letkd2":
        return
    import letkd2

    fresh = letkd2.regnet([1, 1, 2], [16, 32, 64], 10)
    student = load_student(fresh, folder / "runs" / "letkd2-quick" / "student.pt")
    assert sum(key.endswith(".head.weight") for key in student.state_dict()) == 2  # KD layers
    accuracy = dict(re.findall(r"^([\w -]+): ([\d.]+) %", output, re.M))
    assert accuracy["letKD-2"] == accuracy["loaded and baked"]


def test_own_loop_goes_on_where_it_stopped_and_exports(tmp_path):
    pytest.importorskip("timm")
    first = run("own_loop", tmp_path, "--epochs", 1)
    second = run("own_loop", tmp_path, "--resume")
    assert re.findall(r"^epoch (\d+):", first, re.M) == ["0"]
    assert re.findall(r"^epoch (\d+):", second, re.M) == ["1"]
    assert "layer4" in first
    folder = tmp_path / "runs" / "own_loop-quick"
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert saved["kd"]["step"] == 16
    program = torch.export.load(folder / "student.pt2").module()
    assert program(torch.zeros(1, 3, 28, 28)).shape == (1, 10)


def test_a_second_call_trains_from_the_record_alone(tmp_path):
    first, second = run("recorded", tmp_path), run("recorded", tmp_path)
    assert re.findall(r"^(.*): \d+\.\d\d %$", first, re.M) == ["teacher", "recorded teacher"]
    assert second == first[first.index("epoch 0") :]  # the same student, without a teacher
    assert (tmp_path / "runs" / "recorded-quick" / "record" / "record.json").exists()


def test_quick_calls_and_other_images_have_folders_of_their_own(monkeypatch, tmp_path):
    import data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "folder", lambda root, end: data.digits(end))
    calls = {
        (): "recorded",
        ("--quick",): "recorded-quick",
        ("--data", "pictures/pets"): "recorded/pets",
        ("--data", "pictures/pets", "--out", "mine"): "../mine",
    }
    for options, folder in calls.items():
        monkeypatch.setattr(sys, "argv", ["examples/recorded.py", *options])
        args = data.options("What it shows.").parse_args()
        data.load(args)
        assert args.out.resolve() == (tmp_path / "runs" / folder).resolve()
        assert args.out.is_dir()


def scripts():
    """The examples with the digits, one by one."""
    folders = (EXAMPLES, EXAMPLES / "frameworks")
    files = [file for folder in folders for file in folder.glob("*.py")]
    return [file for file in files if "data.options(__doc__" in file.read_text("utf-8")]


@pytest.mark.parametrize("file", scripts(), ids=lambda file: file.stem)
def test_help_begins_with_what_the_script_shows_and_leaves_out_the_commands(file, monkeypatch):
    import data

    monkeypatch.setattr(sys, "argv", [str(file)])
    about = ast.get_docstring(ast.parse(file.read_text("utf-8")), clean=False)
    described = data.options(about).description
    assert about.startswith(described)
    assert "python examples" not in described


@pytest.mark.parametrize(
    ("name", "epochs", "students"),
    [("quickstart", 60, 8), ("label_free", 15, 3), ("several_labels", 60, 6)],
)
def test_the_epochs_are_those_that_help_says(name, epochs, students, tmp_path, monkeypatch, capsys):
    module, trained = importlib.import_module(name), []
    train, digits = module.train, module.data.digits

    def counted(model, images, epochs, *more):  # one epoch is enough to see how many were asked
        trained.append(epochs)
        return train(model, images, 1, *more)

    monkeypatch.setattr(module, "train", counted)
    monkeypatch.setattr(module, "probes", lambda *_: {}, raising=False)
    monkeypatch.setattr(module, "SEEDS", range(2), raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit):
        module.main()
    assert f"epochs of the student; default: {epochs}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--epochs", "7"])
    monkeypatch.setattr(module.data, "digits", lambda end: digits(end).first(300, 50))
    module.main()
    assert trained.count(7) == students


def test_a_foundation_model_teaches_without_labels(tmp_path):
    pytest.importorskip("timm")
    lines = [json.loads(line) for line in run("label_free", tmp_path).splitlines()]
    assert [line["model"] for line in lines] == ["teacher", "untrained", "distilled"]
    for line in lines:
        measures = ["k-NN", "linear"] + ["fine-tuned"] * (line["model"] != "teacher")
        assert all(0 <= line[measure] <= 100 for measure in measures)


def test_images_with_several_labels(tmp_path):
    found = [json.loads(line) for line in run("several_labels", tmp_path).splitlines()]
    assert [line["model"] for line in found] == ["teacher", "labels only", "BinaryKDLoss"]
    assert all(0 <= line["mAP"] <= 100 for line in found)


def test_a_teacher_of_timm_by_its_name(tmp_path, monkeypatch, capsys):
    """With random weights, as there is no network; the size and normalisation are its own."""
    timm = pytest.importorskip("timm")
    import label_free

    asked, create = [], timm.create_model

    def offline(name, pretrained=False, **options):
        asked.append((name, pretrained))
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    monkeypatch.setattr(sys, "argv", ["label_free.py", "--quick", "--teacher", "test_vit"])
    monkeypatch.chdir(tmp_path)
    label_free.main()
    assert asked[0] == ("test_vit", True)
    assert '"distilled"' in capsys.readouterr().out


def test_a_folder_of_ones_own_images(tmp_path):
    from torchvision.transforms.functional import to_pil_image

    for split, count in (("train", 60), ("test", 4)):
        for label in ("cats", "dogs"):
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(256, (3, 40, 50), dtype=torch.uint8)
                to_pil_image(pixels).save(folder / f"{index}.png")
    output = run("skd", tmp_path, "--data", tmp_path)
    assert re.search(r"^student-friendly KD: (\d+\.\d\d) %$", output, re.M)
    (tmp_path / "test" / "dogs").rename(tmp_path / "test" / "wolves")
    with pytest.raises(AssertionError, match="do not have the same class folders"):
        run("skd", tmp_path, "--data", tmp_path)


@pytest.mark.parametrize("script", [*SCRIPTS, *FRAMEWORKS], ids=lambda script: script.stem)
def test_they_are_short_and_complete(script):
    text = script.read_text("utf-8")
    assert len(text.splitlines()) <= 100
    path = f"examples/{script.relative_to(EXAMPLES).as_posix()}"
    assert f"python {path}" in text or f"{path} --quick" in text
    assert "kd.loss(" in text or "KDTrainer(" in text  # which calls it
    local = {file.stem for file in EXAMPLES.rglob("*.py")}
    imported = re.findall(r"^(?:from|import) (\w+)", text, re.M)
    assert set(imported) & local <= {"data"}


def test_there_are_not_too_many():
    assert len(SCRIPTS) <= 12
    assert len((EXAMPLES / "data.py").read_text("utf-8").splitlines()) <= 100
    assert [file.name for file in EXAMPLES.glob("_*")] in ([], ["__pycache__"])


@pytest.mark.parametrize("folder", ["", "recipes", "benchmarks"])
def test_a_page_names_every_script(folder):
    page = (EXAMPLES / folder / "README.md").read_text("utf-8")
    scripts = [file.name for file in (EXAMPLES / folder).glob("[a-z]*.py")]
    scripts += [f"frameworks/{file.name}" for file in FRAMEWORKS if not folder]
    assert [name for name in scripts if f"`{name}`" not in page] == []
    assert len(page.splitlines()) <= 45
