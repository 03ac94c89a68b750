"""The papers' recipes: settings, images, teachers from files."""

import _train
import cifar100
import iekd_cifar10
import imagenet
import pytest
import torch
import torch.nn.functional as F
from _cifar100 import PAIRS, network
from _methods import Pair, Sizes, Taps, attach
from common.cifar import stand_in
from common.images import Augmented, Images, cropped
from common.teachers import load_teacher
from common.testing import parameters
from torchvision.transforms import functional as reference

from kdlayers import CodebookTargets, DecisionTargets
from tests.examples import EXAMPLES
from tests.examples.recipe_teachers import theirs

# ---------------------------------------------------------------- settings


def test_published_hyperparameters(tmp_path):
    args = cifar100.parse([])
    assert (args.epochs, args.batch_size, args.num_templates, args.subclasses) == (240, 64, 4096, 8)
    assert (args.sharpness, args.components) == (1.0, 60)
    rates = {name: pair.lr for name, pair in PAIRS.items()}
    light = [name for name, rate in rates.items() if rate == 0.01]
    assert light == [name for name in rates if "shufflenet" in name or "mobilenet" in name]
    assert set(rates.values()) == {0.05, 0.01}
    alphas = {name: pair.alphas for name, pair in PAIRS.items() if pair.alphas != (1.0, 1.0)}
    assert alphas == {"resnet50-mobilenet_v2_half": (0.2, 0.1)}
    assert _train.milestones(cifar100.FRACTIONS, 240) == [150, 180, 210]
    assert _train.milestones(iekd_cifar10.FRACTIONS, 160) == [80, 120]


@pytest.mark.parametrize("pairs", [PAIRS, imagenet.PAIRS], ids=["cifar100", "imagenet"])
def test_published_numbers_are_on_the_recipes_page(pairs):
    page = (EXAMPLES.parent / "docs" / "recipes.md").read_text("utf-8").splitlines()
    for name, pair in pairs.items():
        row = next(line for line in page if line.startswith("| `--pair") and f"{name}`" in line)
        *numbers, ours = (cell.strip() for cell in row.split("|")[2:-1])
        columns = ("teacher", "labels", "kd", "dkd", "quest", "letkd-1", "letkd-2")
        said = dict(zip(columns, numbers, strict=True))
        known = {k: f"{v:.2f}" for k, v in pair.published.items() if k in columns}
        assert {k: v for k, v in said.items() if v} == known
        assert ours == "not run here"


def attached(method, pair=None, classes=100):
    """A student with a method attached, and the handle."""
    taps = Taps()
    pair = pair or Pair("resnet8", "resnet8", (taps, taps), lr=0.05, beta=2.0)
    student, teacher = network(pair.student, classes), network(pair.teacher, classes)
    example = torch.zeros(2, 3, 32, 32)
    needs = None if method == "layers" else teacher
    kd = attach(method, pair, student, needs, 10, example, classes, Sizes(32, 1.0, 2, 8))
    return student, teacher, kd


def layer_alphas(student):
    return [m.alpha for _, m in student.named_modules() if hasattr(m, "alpha")]


@pytest.mark.parametrize(
    ("method", "alphas"),
    [("labels", []), ("layers", [1, 1]), ("quest", [0]), ("letkd-1", [1]), ("letkd-2", [1, 1])],
)
def test_layers_of_a_method(method, alphas):
    student, _, kd = attached(method)
    assert layer_alphas(student) == alphas
    assert (kd is None) == (method in ("labels", "layers"))


def test_unsupervised_layers_are_as_large_as_the_supervised():
    sizes = [parameters(attached(method)[0]) for method in ("layers", "letkd-2")]
    assert sizes[0] == sizes[1]


def test_value_ratios_of_mobilenet():
    student, _, _ = attached("letkd-2", PAIRS["resnet50-mobilenet_v2_half"])
    assert layer_alphas(student) == [0.2, 0.1]


def one_loss(kd, student):
    student.train()
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    student(x)
    kd.loss(y).backward()
    return {name: float(value) for name, value in kd.terms.items()}


def test_weights_of_the_baselines():
    student, _, kd = attached("kd")
    terms = one_loss(kd, student)
    assert terms["KDLoss.weighted"] == pytest.approx(0.9 * terms["KDLoss"])
    student, _, kd = attached("dkd")
    terms = one_loss(kd, student)
    assert terms["DKDLoss.weighted"] == pytest.approx(terms["DKDLoss"] / 20)  # the first epoch
    student, _, kd = attached("fitnet")
    terms = one_loss(kd, student)
    assert terms["FitNetLoss.layer2.weighted"] == pytest.approx(100 * terms["FitNetLoss.layer2"])
    student, _, kd = attached("at")
    terms = one_loss(kd, student)
    weighted = [value for name, value in terms.items() if name.endswith(".weighted")]
    assert len(weighted) == 3
    assert sum(weighted) == pytest.approx(terms["total"])


def test_teachers_larger_grid_is_averaged_two_by_two():
    """The published cross-architecture pairs, before training."""
    torch.manual_seed(0)
    taps = Taps()
    pair = Pair("wrn_10_1", "shufflenet_v1", (taps, taps), lr=0.01, beta=8.0)
    _, teacher, kd = attached("letkd-2", pair, classes=4)
    batches = [(torch.randn(20, 3, 32, 32), torch.arange(20) % 4) for _ in range(2)]
    found = {}
    teacher.layer3[0].register_forward_hook(lambda _, __, y: found.update(first=y))
    teacher.last.register_forward_hook(lambda _, __, y: found.update(last=y))
    rows = {"first": [], "last": []}
    for x, y in batches:
        with torch.no_grad():
            teacher.eval()(x)
        for name, maps in found.items():
            rows[name].append((F.avg_pool2d(maps, 2, 2).movedim(1, -1), y))
    with pytest.warns(match="components=8.* is reduced to 3"):
        kd.fit(batches, progress=False)
    with pytest.warns(match="components=8.* is reduced to 3"):
        decisions = DecisionTargets(2, components=8).fit(rows["first"])
    codebook = CodebookTargets(32).fit(rows["last"])
    state = kd.state_dict()["losses"]
    centers = state["TemplateLoss.last"]["template_targets.centers"]
    torch.testing.assert_close(centers, codebook.centers, rtol=1e-4, atol=1e-5)
    table = state["TemplateLoss.layer3.0"]["template_targets.decisions"]
    torch.testing.assert_close(table, decisions.decisions)


# ---------------------------------------------------------------- images


@pytest.mark.parametrize("mode", ["reflect", "constant"])
def test_crops_are_torchvisions(mode):
    pixels = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8)
    shifts = torch.tensor([[0, 8, 4, 1, 7, 3], [8, 0, 4, 6, 2, 5]])
    flips = torch.tensor([True, False, True, False, True, False])
    found = cropped(pixels, shifts, flips, 4, mode)
    for image, top, left, flip, ours in zip(pixels, *shifts.tolist(), flips, found, strict=True):
        padded = reference.pad(image, [4], padding_mode=mode)
        theirs = reference.crop(padded, top, left, 32, 32)
        theirs = reference.hflip(theirs) if flip else theirs
        assert torch.equal(ours, theirs)


def test_an_epoch_has_each_image_once_and_drops_the_rest():
    labels = torch.arange(50)
    images = Images(torch.zeros(50, 3, 32, 32, dtype=torch.uint8), labels, (0.5,) * 3, (0.5,) * 3)
    batches = Augmented(images, 8, padding=4, mode="reflect")
    seen = torch.cat([y for _, y in batches])
    assert len(batches) == 6
    assert len(seen) == len(seen.unique()) == 48
    torch.manual_seed(3)
    first, second = (torch.cat([y for _, y in batches]) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, torch.cat([y for _, y in batches]))


def test_plain_batches_are_normalised_in_order():
    means = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    train, test = stand_in("cifar100", 130, *means)
    x, y = (torch.cat(parts) for parts in zip(*train.batches(50), strict=True))
    assert torch.equal(y, train.labels)
    theirs = reference.normalize(train.pixels / 255, *means)
    torch.testing.assert_close(x, theirs)
    assert len(test) == 100
    with pytest.raises(SystemExit, match="100 or more, not 99"):
        stand_in("cifar100", 99, *means)


def test_data_sets_must_be_named():
    with pytest.raises(SystemExit, match=r"no folder for cifar100.*--stand-in"):
        cifar100.main([])


# ---------------------------------------------------------------- teachers


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("resnet8x4", "layer2.0.downsample.0.weight"),
        ("resnet14", "layer3.1.bn2.running_var"),
        ("wrn_16_2", "block2.layer.0.convShortcut.weight"),
        ("resnet50", "layer1.0.shortcut.0.weight"),
    ],
)
@pytest.mark.parametrize("key", ["model", None])
def test_usual_teachers_load(tmp_path, name, known, key):
    model, state = theirs(name)
    assert known in state
    path = tmp_path / "teacher.pth"
    torch.save(state if key is None else {"epoch": 240, key: state, "best_acc": 79.4}, path)
    torch.manual_seed(6)
    loaded = network(name)
    load_teacher(loaded, name, path)
    for ours, same in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True):
        assert torch.equal(ours, same)


def test_teachers_that_do_not_fit_say_where(tmp_path):
    path = tmp_path / "teacher.pth"
    torch.save({"model": theirs("resnet14")[1]}, path)
    with pytest.raises(SystemExit, match=r"fit resnet20; \d+ missing: layer1.2.bn1.bias, .*"):
        load_teacher(network("resnet20"), "resnet20", path)
    with pytest.raises(SystemExit, match=r"fc.weight is \[100, 64\] and should be \[10, 64\]"):
        load_teacher(network("resnet14", 10), "resnet14", path)
    torch.save({"net": {}, "acc": 1.0}, path)
    with pytest.raises(SystemExit, match=r"has no state dict.*found .'net', 'acc'"):
        load_teacher(network("resnet14"), "resnet14", path)
    torch.save(network("resnet8"), path)
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint of tensors"):
        load_teacher(network("resnet8"), "resnet8", path)
    with pytest.raises(SystemExit, match="there is no file"):
        load_teacher(network("resnet8"), "resnet8", tmp_path / "none.pth")
