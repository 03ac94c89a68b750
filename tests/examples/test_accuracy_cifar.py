"""The accuracy benchmark on CIFAR: its data, its teachers, recorded views, runs that go on."""

import json
import multiprocessing
import pickle
from pathlib import Path

import pytest
import torch
from common import cifar, files, testing, training
from common.images import augmented
from PIL import Image
from torch.distributions import Categorical

from kdlayers import AttentionTransferLoss
from tests.benchmark_modules import load

accuracy = load("accuracy")
supervision_table = load("_accuracy_words").supervision_table
data, records, teachers = (load(f"_accuracy_{name}") for name in ("data", "record", "teacher"))

WORDS = (
    "--regime cifar100-10000 --teacher resnet8 --validation 100 --images 200 --epochs 3 --views 2 "
    "--student resnet8 --width 8 --templates 8 --subclasses 1 --components 9 --batch-size 50 "
    "--width-parameters 9 --width-macs 8.5 --iekd-epochs 1"
)
OPTIONS = WORDS.split()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Class folders with four and two pictures of a hundred classes, each of its own colour."""
    folder = tmp_path_factory.mktemp("cifar100")
    draw = torch.Generator().manual_seed(0)
    colours = torch.randint(30, 225, (100, 3), generator=draw)
    for part, count in (("train", 4), ("test", 2)):
        for label in range(100):
            place = folder / part / f"class{label:03}"
            place.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(-30, 30, (32, 32, 3), generator=draw)
                pixels = (colours[label] + noise).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A teacher's weights under the names of the usual collections."""
    torch.manual_seed(1)
    model = load("models.cifar_resnet").make("resnet8", num_classes=100)
    state = {
        f"module.{k.replace('shortcut', 'downsample')}": v for k, v in model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("teacher") / "resnet8.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(root, checkpoint, cache):
    """Runs the benchmark; shares data, teacher and record, and restores the number of threads."""
    threads = torch.get_num_threads()

    def run(out, *options):
        paths = ["--root", str(root), "--cache", str(cache), "--out", str(out)]
        accuracy.main([*OPTIONS, *paths, "--teacher-checkpoint", str(checkpoint), *options])
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    yield run
    torch.set_num_threads(threads)


# ------------------------------------------------------------------ data


def test_class_folders_are_read_with_labels_in_alphabetical_order(root, tmp_path):
    images, labels = cifar.read("cifar100", root, tmp_path, "train")
    assert labels.tolist() == [label for label in range(100) for _ in range(4)]
    picture = Image.open(root / "train" / "class042" / "3.png")
    expected = torch.tensor(list(picture.get_flattened_data())).view(32, 32, 3).permute(2, 0, 1)
    assert torch.equal(images[42 * 4 + 3], expected.to(torch.uint8))


def test_torchvisions_layout_is_read(root, tmp_path):
    images, labels = cifar.read("cifar100", root, tmp_path, "test")
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rows = images.flatten(1).numpy()
    content = {"data": rows, "fine_labels": labels.tolist(), "fine_label_names": []}
    kind = cifar.KINDS["cifar100"]
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_check_integrity", lambda _: True)
        patch.setattr(kind, "_load_meta", lambda _: None)
        again, same = cifar.read("cifar100", tmp_path, tmp_path, "test")
    assert torch.equal(again, images)
    assert torch.equal(same, labels)


def test_decoded_images_are_kept_for_the_same_files_only(root, tmp_path, capsys):
    first = cifar.read("cifar100", root, tmp_path, "test")
    assert "decoding 200 images" in capsys.readouterr().out
    again = cifar.read("cifar100", root, tmp_path, "test")
    assert capsys.readouterr().out == ""
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    other = tmp_path / "other"
    (other / "test").parent.mkdir()
    (other / "test").symlink_to(root / "train", target_is_directory=True)
    assert len(cifar.read("cifar100", other, tmp_path, "test")[1]) == 400


def test_what_is_not_there_is_said(root, tmp_path):
    with pytest.raises(SystemExit, match=r"cifar-100-python.*--download.*train/CLASS/IMAGE"):
        cifar.read("cifar100", tmp_path, tmp_path, "train")
    with pytest.raises(SystemExit, match="has 100 class folders, cifar10 has 10 classes"):
        cifar.read("cifar10", root, tmp_path, "train")


def test_colour_images_are_cropped_mirrored_and_normalised(root, tmp_path):
    splits = data.load("cifar100", str(root), tmp_path, validation=100)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [300, 100, 200]
    (x, _), *_ = splits.test.batches(3)
    for channel in range(3):
        expected = (splits.test.pixels[0, channel] / 255 - data.MEAN[channel]) / data.STD[channel]
        torch.testing.assert_close(x[0, channel], expected)
    part = splits.train.pixels[:40]
    seen = augmented(part, 4, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(part, (4,) * 4)
    for image, result in zip(padded, seen, strict=True):
        crops = [image[:, t : t + 32, m : m + 32] for t in range(9) for m in range(9)]
        fits = [crop for c in crops for crop in (c, c.flip(2)) if torch.equal(crop, result)]
        assert len(fits) == 1


# ------------------------------------------------------------------ teacher


def test_a_teacher_is_tested_once_and_held_to_its_claim(root, checkpoint, tmp_path, capsys):
    splits = data.load("cifar100", str(root), tmp_path, validation=100)
    teacher, facts = teachers.given_teacher(checkpoint, "resnet8", splits, tmp_path, None)
    found = testing.accuracy(teacher, splits.test.batches()).top1
    assert f"{found:.2f} % of the test images" in capsys.readouterr().out
    assert facts["test_accuracy"] == found
    assert facts["parameters"] == sum(p.numel() for p in teacher.parameters())
    teachers.given_teacher(checkpoint, "resnet8", splits, tmp_path, found + 0.4)
    with pytest.raises(SystemExit, match=r"not 72\.63 % as --teacher-accuracy says"):
        teachers.given_teacher(checkpoint, "resnet8", splits, tmp_path, 72.63)
    with pytest.raises(SystemExit, match="does not fit resnet14"):
        teachers.given_teacher(checkpoint, "resnet14", splits, tmp_path, None)


# ------------------------------------------------------------------ record


@pytest.fixture
def record(root, checkpoint, cache):
    splits = data.load("cifar100", str(root), cache, validation=100)
    teacher, facts = teachers.given_teacher(checkpoint, "resnet8", splits, cache, None)
    split = data.few(splits.train, 120, 0)
    points = ["layer1", "layer3.0", "last"]
    made = records.recorded(teacher, "hash", split, points, cache, views=2, padding=4)
    return teacher, made


def test_a_record_is_what_the_teacher_says_about_the_views(record):
    teacher, made = record
    replay = records.Replay(made)
    views, index = torch.tensor([0, 1, 2, 2]), torch.tensor([5, 5, 119, 7])
    x, y = replay.told(views, index)
    assert torch.equal(y, made.split.labels[index])
    torch.testing.assert_close(x[0], made.split.normalised(made.split.pixels[5:6])[0])
    assert not torch.equal(x[0], x[1])
    taps = {}
    for model in (teacher, replay):
        for name in ("layer1", "layer3.0", "last"):
            module = model.get_submodule(name)
            module.register_forward_hook(
                lambda _, __, out, key=(model is replay, name): taps.__setitem__(key, out)
            )
    with torch.no_grad():
        torch.testing.assert_close(replay(x), teacher(x), rtol=2e-3, atol=2e-3)
    for name in ("layer3.0", "last"):
        torch.testing.assert_close(taps[True, name], taps[False, name], rtol=2e-3, atol=2e-3)
    student = torch.rand(4, 5, 32, 32)
    loss = AttentionTransferLoss(at="layer1")
    found, expected = (loss(student, taps[recorded, "layer1"]) for recorded in (True, False))
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-9)


def test_every_view_of_an_image_comes_in_turn(record):
    _, made = record
    replay = records.Replay(made)
    batches = records.RecordedBatches(replay, 20, seed=3)
    seen = []
    for epoch in range(2):
        pairs = []
        for x, y in batches.epoch(epoch):
            assert len(x) == len(y) == 20
            pairs += [tuple(pair) for pair in replay.keys.T.tolist()]
        assert sorted(index for _, index in pairs) == list(range(120))
        seen.append({index: view for view, index in pairs})
    assert all({seen[0][index], seen[1][index]} == {1, 2} for index in range(120))
    again = records.RecordedBatches(replay, 20, seed=3)
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(batches.epoch(1), again.epoch(1), strict=True)
    )
    plain = batches.plain(50)
    assert [len(y) for _, y in plain] == [len(y) for _, y in plain] == [50, 50, 20]
    assert replay.keys[0].eq(0).all()


# ------------------------------------------------------------------ runs


def test_a_record_in_memory_gives_the_same_batches_and_outputs(record):
    _, made = record
    whole = records.Record(made.folder, made.split, made.views).to("cpu")
    outputs = []
    for kept in (made, whole):
        replay = records.Replay(kept)
        batches = records.RecordedBatches(replay, 20, seed=3)
        taps = []
        replay.get_submodule("layer3.0").register_forward_hook(lambda _, __, y, t=taps: t.append(y))
        outputs.append([(x, y, replay(x)) for x, y in batches.epoch(1)])
        assert len(taps) == len(batches)
        outputs[-1].append(taps)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=0)


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


def test_what_the_teacher_says_is_measured(bench, root, checkpoint, cache, tmp_path, record):
    supervision = load("supervision")
    out = tmp_path / "tiny.teacher.json"
    paths = ["--root", str(root), "--cache", str(cache), "--out", str(out)]
    supervision.main([*OPTIONS, *paths, "--teacher-checkpoint", str(checkpoint)])
    found = json.loads(out.read_text("utf-8"))
    assert set(found["logits"]) == {"students' images", "their augmented views", "test images"}
    splits = data.load("cifar100", str(root), cache, validation=100)
    teacher, facts = teachers.given_teacher(checkpoint, "resnet8", splits, cache, None)
    tested = found["logits"]["test images"]
    assert tested["accuracy"] == pytest.approx(facts["test_accuracy"], abs=0.51)
    with torch.no_grad():
        logits = torch.cat([teacher(x) for x, _ in splits.test.batches(50)])
    for temperature in (1, 4):
        chances = [Categorical(logits=row / temperature) for row in logits]
        expected = sum(float(chance.entropy().exp()) for chance in chances) / len(chances)
        name = f"perplexity, temperature {temperature}"
        assert tested[name] == pytest.approx(expected, rel=2e-3)
    for place in found["codebook"].values():
        scatter = [place[f"perplexity, sharpness {value}"] for value in ("1", "0.3", "0.1")]
        assert 1 <= scatter[0] < scatter[1] < scatter[2] <= 8
    assert all(0 < place["own class"] <= 1 for place in found["decisions"].values())
    # With one sub-class a class both are the same; where the table was fitted it is surest.
    assert all(p["own class"] == p["own sub-class"] for p in found["decisions"].values())
    _, made = record
    rows = supervision.Rows(supervision.Places(made, "layer3.0", "last"), "layer3.0")
    features = torch.cat([x for x, _ in rows])
    expected = torch.cat(
        [
            x.movedim(0, -1).flatten(0, 1)
            for x in made.take(
                "layer3.0", torch.zeros(120, dtype=torch.long), torch.arange(120)
            ).float()
        ]
    )
    torch.testing.assert_close(features, expected)
    seen, views, _ = (place["own class"] for place in found["decisions"].values())
    assert seen > views
    lines = supervision_table(out).splitlines()
    values = [f"{place['accuracy']:.4g}" for place in found["logits"].values()]
    assert lines[4] == f"| logits: accuracy | {' | '.join(values)} |"
    assert supervision_table(tmp_path / "none.json") == ""


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
