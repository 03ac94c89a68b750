"""The accuracy benchmark: its data, its methods, pairing by seed, resuming."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from kdlayers import KDPoint, attach_kd, load_student

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
import _accuracy_data as data  # noqa: E402
import accuracy  # noqa: E402
from _accuracy_methods import Options, attach, loss, recipes  # noqa: E402
from _accuracy_probe import BUDGETS, discriminant, pooled  # noqa: E402
from _accuracy_train import digest, macs, matching_width, new_model  # noqa: E402
from common import fashion_mnist  # noqa: E402
from common.images import Augmented, augmented  # noqa: E402
from common.testing import parameters  # noqa: E402
from models.small_torchvision import mobilenet_v2, vgg  # noqa: E402


@pytest.fixture
def splits(image_root):
    return data.load("fashion-mnist", str(image_root), Path(), validation=20)


# ------------------------------------------------------------------ data


def test_splits_are_disjoint_and_complete(splits, image_root):
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [140, 20, 40]
    together = torch.cat([splits.train.pixels, splits.validation.pixels]).flatten(1)
    whole = fashion_mnist.read(image_root, "train").pixels.flatten(1)
    assert torch.equal(*(part[part.sum(1).argsort()].sum(1) for part in (together, whole)))
    assert splits.classes == 10
    rows = splits.train.pixels.float().mean(2).argmax(1)  # images stay with their labels
    assert torch.equal(rows, 2 * splits.train.labels + 4)


def test_missing_data_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path)
    with pytest.raises(SystemExit, match=r"pass --download.*dataset-fashion-mnist"):
        data.load("fashion-mnist", str(tmp_path), tmp_path, validation=20)


def test_what_is_no_idx_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\0\0\x0d\x01" + bytes(8))
    with pytest.raises(SystemExit, match="not an IDX file of bytes"):
        fashion_mnist.idx(tmp_path / "x")


def test_few_are_balanced_and_drawn_by_seed(splits):
    first, again, other = (data.few(splits.train, 40, seed) for seed in (3, 3, 4))
    assert first.labels.bincount().tolist() == [4] * 10
    assert torch.equal(first.pixels, again.pixels)
    assert not torch.equal(first.pixels, other.pixels)
    assert len(data.few(splits.train, 0, 0)) == len(splits.train)


def test_augmentation_is_a_shift_and_a_flip():
    images = torch.randint(1, 256, (50, 6, 5), dtype=torch.uint8)
    seen = augmented(images, 2, True, torch.Generator().manual_seed(0))
    found = set()
    for image, result in zip(images, seen, strict=True):
        padded = torch.zeros(10, 9, dtype=torch.uint8)
        padded[2:8, 2:7] = image
        crops = {(t, m, 0): padded[t : t + 6, m : m + 5] for t in range(5) for m in range(5)}
        crops |= {(t, m, 1): crop.flip(1) for (t, m, _), crop in list(crops.items())}
        fits = [key for key, crop in crops.items() if torch.equal(crop, result)]
        assert len(fits) == 1
        found.update(fits)
    assert len(found) > 25  # of 50 ways
    assert {flip for _, _, flip in found} == {0, 1}
    assert torch.equal(augmented(images, 0, False, torch.Generator()), images)


def test_batches_depend_on_seed_and_epoch_only(splits):
    def epoch(seed, number):
        torch.rand(3)  # the global generator has no part in it
        pairs = list(Augmented(splits.train, 20, padding=2, seed=seed).epoch(number))
        assert [len(y) for _, y in pairs] == [20] * 7
        return torch.cat([x for x, _ in pairs])

    assert torch.equal(epoch(0, 0), epoch(0, 0))
    assert not torch.equal(epoch(0, 0), epoch(0, 1))
    assert not torch.equal(epoch(0, 0), epoch(1, 0))


def test_normalisation(splits):
    (x, y), *_ = splits.test.batches(7)
    assert x.shape == (7, 1, 28, 28)
    torch.testing.assert_close(x[0, 0], (splits.test.pixels[0] / 255 - 0.2860) / 0.3530)
    assert torch.equal(y, splits.test.labels[:7])


# ------------------------------------------------------------------ methods


def test_every_method_runs_and_leaves_a_full_line(bench, tmp_path):
    out = tmp_path / "runs.jsonl"
    lines = bench(out, "--seeds", "0")
    assert [line["method"] for line in lines] == list(recipes(Options()))
    for line in lines:
        assert 0 <= line["test_accuracy"] <= 100
        assert line["recipe_hash"] == digest(line["recipe"])
        assert line["recipe"]["teacher"] == line["teacher"]["recipe_hash"]
        assert line["seconds_per_epoch"] > 0
        assert None not in line["last_terms"].values()
        assert set(line["versions"]) == {"kdlayers", "torch", "python"}
    by_name = {line["method"]: line for line in lines}
    assert by_name["QuEST"]["parameters"] == by_name["labels only"]["parameters"]
    assert by_name["layers only (2)"]["parameters"] == by_name["letKD-2"]["parameters"]
    assert by_name["layers only (2)"]["macs"] == by_name["letKD-2 + KD"]["macs"]
    assert by_name["letKD-1"]["probes"].keys() == {"last", "last.before", "last.after"}
    assert [cut["budget"] for cut in by_name["letKD-2"]["pruned"]] == list(BUDGETS)
    assert by_name["KD"]["pruned"] == []
    near = by_name["wider, same parameters"]["parameters"] / by_name["letKD-2"]["parameters"]
    assert 0.9 < near < 1.1


def test_a_run_that_is_there_is_skipped_and_repeats_exactly(bench, tmp_path):
    out = tmp_path / "runs.jsonl"
    methods = ("--methods", "KD", "letKD-1")
    first = bench(out, *methods, "--seeds", "0", "1")
    assert [(line["seed"], line["method"]) for line in first] == [
        (0, "KD"), (0, "letKD-1"), (1, "KD"), (1, "letKD-1")
    ]  # fmt: skip
    assert bench(out, *methods, "--seeds", "0", "1") == first
    out.write_text("".join(f"{json.dumps(line)}\n" for line in first[:3]), "utf-8")
    resumed = bench(out, *methods, "--seeds", "0", "1")
    assert resumed[:3] == first[:3]
    accuracies = [
        [line[f"{part}_accuracy"] for part in ("training", "validation", "test")]
        for line in (first[3], resumed[3])
    ]
    assert accuracies[0] == accuracies[1]
    assert first[3]["last_terms"] == resumed[3]["last_terms"]
    # Another recipe is another run.
    assert len(bench(out, "--methods", "KD", "--seeds", "0", "--kd-weight", "0.5")) == 5


def test_recorded_views_of_grey_images_in_bfloat16(bench, tmp_path):
    options = ("--views", "2", "--augment", "--precision", "bfloat16", "--width", "8")
    (line,) = bench(tmp_path / "v.jsonl", *options, "--methods", "letKD-1", "--seeds", "0")
    assert (line["recipe"]["views"], line["recipe"]["precision"]) == (2, "bfloat16")
    assert len(line["curve"]) == 1
    assert line["last_terms"]["TemplateLoss.last"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--views records cropped and mirrored images: add --augment"),
        (["--augment", "--first", "layer2"], "a record has only the attention map of layer2"),
        (["--augment", "--last", "features.9:layer1"], "only the attention map of features.9:lay"),
    ],
)
def test_a_record_that_would_not_hold_what_the_recipe_says(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        accuracy.parse(["--out", str(tmp_path / "v.jsonl"), "--views", "2", *options])
    assert message in capsys.readouterr().err


def test_tuning_leaves_the_test_images_alone(bench, tmp_path):
    line, *_ = bench(tmp_path / "t.jsonl", "--tuning", "--methods", "labels only", "--seeds", "9")
    assert line["test_accuracy"] is None
    assert line["validation_accuracy"] >= 0


def test_unknown_methods_are_named(bench, tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench(tmp_path / "runs.jsonl", "--methods", "letKD-3")
    assert "no method ['letKD-3']; the methods are ['labels only', 'KD'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(recipes(Options(templates=8, subclasses=1))))
def test_students_start_equal(name, splits):
    """All methods of one width have the same initial weights, also those of KD layers."""
    recipe = recipes(Options(templates=8, subclasses=1, width_parameters=8, width_macs=8))
    teacher = new_model("resnet14", splits, 7)
    states = []
    for method in ("letKD-2", name):
        student = new_model("resnet8", splits, 3, width=recipe[method]["width"])
        attach(recipe[method], student, teacher, torch.zeros(2, 1, 28, 28), 5)
        states.append(student.state_dict())
    own = {key for key in states[1] if ".kd." not in key}
    layers = set(states[1]) - own
    if name.startswith(("letKD-1", "QuEST", "layers only (1)")):
        layers = set()  # the only layer is drawn first there, it was second before
    assert own == {key for key in states[0] if ".kd." not in key}
    assert all(torch.equal(states[0][key], states[1][key]) for key in own | layers)


def test_costs_are_those_of_the_formulas(splits):
    recipe = recipes(Options(templates=12, subclasses=2))
    student = new_model("resnet8", splits, 0, width=8)
    before = parameters(student), macs(student, splits)
    attach(recipe["layers only (2)"], student, student, torch.zeros(2, 1, 28, 28), 1)
    added = parameters(student) - before[0], macs(student, splits) - before[1]
    assert added[0] == sum(2 * k * 32 + 2 * k + 2 for k in (20, 12))
    assert added[1] == sum(2 * k * 32 * 49 for k in (20, 12))


def test_matching_width_is_the_nearest(splits):
    target = parameters(new_model("resnet8", splits, 0, width=8)) + 5000
    found = matching_width("resnet8", splits, target, parameters)
    gaps = {
        width: abs(parameters(new_model("resnet8", splits, 0, width=width)) - target)
        for width in (found - 0.25, found, found + 0.25)
    }
    assert min(gaps, key=gaps.get) == found


def test_the_probe_is_linear_discriminant_analysis():
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 3
    features = torch.randn(300, 6, generator=draw) * torch.tensor([1, 2, 3, 1, 1, 0])
    features[:, :2] += labels[:, None]
    train, test = slice(0, 150), slice(150, 300)
    reference = LinearDiscriminantAnalysis(solver="svd", priors=[1 / 3] * 3)
    reference.fit(features[train, :5], labels[train])
    expected = 100 * reference.score(features[test, :5], labels[test])
    found = discriminant(features[train], labels[train], features[test], labels[test])
    assert found == pytest.approx(expected)
    assert 50 < found < 95


def test_probes_see_both_sides_of_a_layer(splits):
    student = new_model("resnet8", splits, 0, width=4)
    attach_kd(student, at=[KDPoint("last", num_templates=8)], example=torch.zeros(2, 1, 28, 28))
    found = pooled(student, "last", splits.test)
    torch.testing.assert_close(found["last"], found["last.after"])
    assert not torch.allclose(found["last.before"], found["last.after"])
    images = torch.cat([x for x, _ in splits.test.batches(40)])
    torch.testing.assert_close(student.fc(found["last"]), student(images))


def test_weights_are_those_of_the_recipe(splits):
    for ramp in (1, 4):  # as in the code of DKD's authors, whose epochs count from 1
        warm = loss({"loss": "DKDLoss", "weight": 2.0, "ramp": ramp}, 10)
        found = [warm.weight(10 * epoch + step) for epoch in range(6) for step in (0, 9)]
        expected = [2.0 * min(epoch / ramp, 1) for epoch in range(1, 7) for _ in (0, 9)]
        assert found == pytest.approx(expected)
    options = Options(templates=8, subclasses=1, layer_weight=3.0, layer_weight_beside=0.5)
    for method, weight in (("letKD-1", 3.0), ("letKD-1 + KD", 0.5)):
        student, (x, _) = (
            new_model("resnet8", splits, 3, width=8),
            next(iter(splits.train.batches(16))),
        )
        teacher = new_model("resnet8", splits, 4)
        kd = attach(recipes(options)[method], student, teacher, x, 5)
        kd.fit([(x, torch.arange(16) % 10)], progress=False)
        student(x)
        kd.loss(torch.arange(16) % 10)
        weighted = kd.terms["TemplateLoss.last.weighted"]
        torch.testing.assert_close(weighted, weight * kd.terms["TemplateLoss.last"])


@pytest.mark.parametrize("method", ["letKD-2", "letKD-2 + KD"])
def test_a_weight_of_the_layers_may_fall(method, splits):
    weights = {"layer_weight": 2.0, "layer_weight_beside": 2.0}
    falling = Options(templates=8, subclasses=1, **weights, layer_epochs=4)
    assert "layer_epochs" not in recipes(falling)[method]
    student, (x, y) = (
        new_model("resnet8", splits, 3, width=8),
        next(iter(splits.train.batches(140))),
    )
    teacher = new_model("resnet8", splits, 4)
    kd = attach(recipes(falling)[f"{method}, falling"], student, teacher, x, 1)
    kd.fit([(x, y)], progress=False)
    found = []
    for _ in range(6):
        student(x)
        kd.loss(y)
        found.append(float(kd.terms["TemplateLoss.last.weighted"] / kd.terms["TemplateLoss.last"]))
    expected = [1 + math.cos(math.pi * min(epoch, 4) / 4) for epoch in range(6)]
    assert found == pytest.approx(expected, abs=1e-6)


def test_quest_has_letkd_1_but_alpha():
    first, second = (recipes(Options())[name] for name in ("QuEST", "letKD-1"))
    assert first["layers"][0] | {"alpha": 1.0} == second["layers"][0]
    assert first["layers"][0]["alpha"] == 0


@pytest.mark.parametrize(
    ("student", "first", "last", "home", "shape"),
    [
        pytest.param(
            *("mobilenet_v2", "features.14", "features.18", "features.18.2", (1, 1280, 7, 7)),
            marks=pytest.mark.release,
        ),
        pytest.param(
            *("vgg", "features.16", "features.19", "features.19", (1, 32, 7, 7)),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_another_architecture_needs_names_for_both(
    bench, tmp_path, student, first, last, home, shape
):
    pair = [f"{first}:layer3.0", f"{last}:last"]
    options = ("--student", student, "--width", "8", "--first", pair[0], "--last", pair[1])
    (line,) = bench(tmp_path / "m.jsonl", "--seeds", "0", "--methods", "letKD-2", *options)
    assert [layer["at"] for layer in line["recipe"]["layers"]] == pair
    assert set(line["probes"]) >= {f"{first}.before", f"{home}.after", "last"}
    model = {"mobilenet_v2": mobilenet_v2, "vgg": vgg}[student](10, in_channels=1, width=8)
    assert model.features(torch.zeros(1, 1, 28, 28)).shape == shape


def test_students_are_saved_with_their_layers(bench, splits, tmp_path):
    options = ("--methods", "KD", "letKD-2 + KD", "--seeds", "3", "--save", str(tmp_path / "s"))
    _, line = bench(tmp_path / "runs.jsonl", *options)
    found = sorted(file.name for file in (tmp_path / "s").iterdir())
    both = ["letKD-2-KD-seed-3.kd.pt", "letKD-2-KD-seed-3.pt"]
    assert found == ["KD-seed-3.kd.pt", *both]  # a student without layers has none to show
    saved = tmp_path / "s" / both[1]
    student = load_student(new_model("resnet8", splits, 0, width=4), saved)
    assert accuracy.accuracy(student, splits.test.batches()).top1 == line["test_accuracy"]
