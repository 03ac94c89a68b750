"""CIFAR in folders, given teachers, and what they say of recorded views."""

import json
import pickle

import pytest
import torch
from common import cifar, testing
from common.images import augmented
from PIL import Image
from torch.distributions import Categorical

from kdlayers import AttentionTransferLoss
from tests.benchmark_modules import load
from tests.examples.cifar import OPTIONS

supervision_table = load("_accuracy_words").supervision_table
data, records, teachers = (load(f"_accuracy_{name}") for name in ("data", "record", "teacher"))

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
