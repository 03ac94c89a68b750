"""Saving, loading, resuming and baking, also in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import (
    AttentionTransferLoss,
    CodebookTargets,
    DecisionTargets,
    KDPoint,
    attach_kd,
    bake,
    load_student,
    save_student,
)
from kdlayers._leaving.student_file import seal
from kdlayers._step.sites import slots
from kdlayers.errors import AttachError, CheckpointError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached():
    torch.manual_seed(2)
    student, teacher = Net(4), Net(6)
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    return student, attach_kd(student, teacher, points, example=IMAGES)


def train(student, kd, optimiser, steps):
    student.train()
    for _ in range(steps):
        optimiser.zero_grad()
        (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
        optimiser.step()


def sgd(student):
    return torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)


def test_three_steps_and_three_after_resuming_equal_six(tmp_path):
    student, kd = attached()
    kd.fit([(IMAGES, LABELS)])
    optimiser = sgd(student)
    train(student, kd, optimiser, 3)
    file = tmp_path / "resume.pt"
    torch.save([student.state_dict(), optimiser.state_dict(), kd.state_dict()], file)
    train(student, kd, optimiser, 3)

    again, kd_again = attached()
    optimiser_again = sgd(again)
    states = torch.load(file, weights_only=True)
    for target, state in zip((again, optimiser_again, kd_again), states, strict=True):
        target.load_state_dict(state)
    assert kd_again.step == 3
    train(again, kd_again, optimiser_again, 3)
    assert all(
        torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters(), strict=True)
    )


class Branches(nn.Module):
    """The output of ``split`` has two readers besides a loss, as in a residual network."""

    def __init__(self, channels):
        super().__init__()
        self.split = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU())
        self.left, self.right = (nn.Conv2d(channels, channels, 3, padding=1) for _ in "lr")
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        x = self.split(x)
        return self.head((self.left(x) + self.right(x)).mean((2, 3)))


def test_a_resumed_run_adds_up_the_gradients_in_the_same_order():
    """Three gradients meet at ``split``, so that another order would round otherwise."""
    torch.manual_seed(0)
    student, teacher = Branches(16), Branches(16)
    images, labels = batch(24)
    loss = AttentionTransferLoss(at="split", weight=100.0)
    kd = attach_kd(student, teacher, losses=[loss], example=images)

    def gradients():
        student.zero_grad()
        (F.cross_entropy(student(images), labels) + kd.loss(labels)).backward()
        return [parameter.grad.clone() for parameter in student.parameters()]

    # The weights are the same; a resumed run begins like the first forward of a handle.
    initial, later = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(initial, later, strict=True))


def test_state_of_other_losses_is_refused():
    student, kd = attached()
    other = attach_kd(Net(4), Net(6), [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    with pytest.raises(CheckpointError, match="attach with the points and losses"):
        other.load_state_dict(kd.state_dict())
    with pytest.raises(CheckpointError, match="expected the state of a KDHandle"):
        kd.load_state_dict(student.state_dict())
    with pytest.raises(CheckpointError, match="version"):
        kd.load_state_dict({**kd.state_dict(), "version": 99})
    for key in ("losses", "step"):
        whole = kd.state_dict()
        for damaged in ({**whole, key: None}, {k: v for k, v in whole.items() if k != key}):
            with pytest.raises(CheckpointError, match="damaged: it has no losses, or no step"):
                kd.load_state_dict(damaged)


def test_a_saved_student_predicts_the_same_in_a_fresh_process(tmp_path):
    student, kd = attached()
    kd.fit([(IMAGES, LABELS)])
    train(student, kd, sgd(student), 2)
    kd.detach()
    save_student(student, tmp_path / "student.pt")
    torch.save({"images": IMAGES, "logits": student.eval()(IMAGES)}, tmp_path / "seen.pt")
    code = (
        "import sys, torch\n"
        "from kdlayers import load_student\n"
        "from tests.nets import Net\n"
        "seen = torch.load(sys.argv[2], weights_only=True)\n"
        "model = load_student(Net(4), sys.argv[1]).eval()\n"
        "assert torch.equal(model(seen['images']), seen['logits'])\n"
    )
    files = [str(tmp_path / "student.pt"), str(tmp_path / "seen.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)


def test_a_saved_student_is_distilled_further(tmp_path):
    student, kd = attached()
    kd.fit([(IMAGES, LABELS)])
    train(student, kd, sgd(student), 3)
    save_student(student, tmp_path / "student.pt")
    loaded = load_student(Net(4), tmp_path / "student.pt")
    with pytest.raises(AttachError, match="or attach to a new model and then load"):
        attach_kd(loaded, Net(6), [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    again, more = attached()
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(again.eval()(IMAGES), student.eval()(IMAGES))
    more.fit([(IMAGES, LABELS)])
    train(again, more, sgd(again), 1)
    assert more.terms.keys() == kd.terms.keys()


def test_loading_keeps_flags_and_random_state(tmp_path):
    student, _ = attached()
    save_student(student, tmp_path / "student.pt")
    fresh = Net(4).eval()
    state = torch.get_rng_state()
    assert load_student(fresh, tmp_path / "student.pt") is fresh
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m.training for m in fresh.modules())
    fresh.train()(IMAGES)
    assert list(slots(fresh)) == ["first", "last"]


class Alias(Net):
    """Has one module under two names, whose keys its state dict then holds twice."""

    def __init__(self):
        super().__init__(4)
        self.features = self.last


@pytest.mark.parametrize("point", ["first", "last", "last.0"])
def test_a_module_with_two_names(tmp_path, point):
    student = Alias()
    attach_kd(student, at=[KDPoint(point, num_templates=5)], example=IMAGES)
    student(IMAGES)
    save_student(student, tmp_path / "student.pt")
    loaded = load_student(Alias(), tmp_path / "student.pt")
    assert torch.equal(loaded.eval()(IMAGES), student.eval()(IMAGES))
    assert list(loaded.state_dict()) == list(student.state_dict())


class Versioned(Net):
    """Loads its state by the version it was saved with."""

    _version = 7

    versions = ()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.versions += (local_metadata.get("version"),)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_modules_find_the_versions_of_their_states(tmp_path):
    student = Versioned(4)
    attach_kd(student, at=[KDPoint("last", num_templates=5)], example=IMAGES)
    save_student(student, tmp_path / "student.pt")
    loaded = load_student(Versioned(4), tmp_path / "student.pt")
    assert set(loaded.versions) == {7}


def content(tmp_path):
    student, _ = attached()
    save_student(student, tmp_path / "student.pt")
    return torch.load(tmp_path / "student.pt", weights_only=True)


def change(path, value):
    def apply(content):
        inner = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return content

    return apply


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (change(["format"], "other"), "not a file of save_student"),
        (change(["version"], 4), "install a newer kdlayers"),
        (change(["version"], "2"), "install a newer kdlayers"),
        (change(["layers"], []), "has no KD layers"),
        (change(["layers"], None), "is damaged"),
        (change(["module_versions"], 3), "is damaged"),
        (change(["layers", 0, "name"], "lost"), "has a KD layer at 'lost'"),
        (change(["layers", 0, "num_templates"], 10**12), "the file is damaged"),
        (change(["layers", 0, "alpha"], float("nan")), "is damaged: a KD layer is described"),
        (change(["layers", 0, "in_channels"], "4"), "is damaged: a KD layer is described"),
        (change(["layers", 0, "in_channels"], True), "is damaged: a KD layer is described"),
        (change(["layers", 0, "alpha"], True), "is damaged: a KD layer is described"),
        (change(["layers", 0, "path"], [[0]]), "is damaged: a KD layer is described"),
        (change(["layers", 0], {"name": "first"}), "is damaged: a KD layer is described"),
        (change(["layers", 0, "memory"], "high"), "is damaged: a KD layer is described"),
        (change(["layers", 0, "eps"], -1e-5), "is damaged: a KD layer is described"),
        (change(["state", "head.weight"], torch.zeros(7, 5)), "head.weight has shape"),
        (change(["state", "extra"], torch.zeros(7)), "extra is unknown"),
        (change(["state"], {}), "the file is damaged"),
    ],
)
@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_files_are_refused_and_the_model_is_untouched(tmp_path, damage, sentence, sealed):
    damaged = damage(content(tmp_path))
    if sealed and damaged["state"] is not None:
        # Whoever wrote it also wrote the checksums that go with it.
        damaged = seal(damaged)
    else:
        sentence = f"{sentence}|is damaged: (it has no checksums|the checksum of)"
    torch.save(damaged, tmp_path / "bad.pt")
    model = Net(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=sentence):
        load_student(model, tmp_path / "bad.pt")
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


class Hostile:
    def __reduce__(self):
        return (print, ("executed",))


def test_files_that_hold_code_or_are_cut_off_are_refused(tmp_path, capfd):
    torch.save({**content(tmp_path), "layers": Hostile()}, tmp_path / "hostile.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "student.pt").read_bytes()[:500])
    for name in ("hostile.pt", "cut.pt"):
        with pytest.raises(CheckpointError, match="could not be read"):
            load_student(Net(4), tmp_path / name)
    assert "executed" not in capfd.readouterr().out
    with pytest.raises(FileNotFoundError):
        load_student(Net(4), tmp_path / "absent.pt")


def test_refusals(tmp_path):
    student, _ = attached()
    save_student(student, tmp_path / "student.pt")
    with pytest.raises(AttachError, match="has KD layers already"):
        load_student(student, tmp_path / "student.pt")
    with pytest.raises(CheckpointError, match="do not fit this Net"):
        load_student(Net(4, classes=7), tmp_path / "student.pt")
    with pytest.raises(AttachError, match="has no KD layers"):
        save_student(Net(4), tmp_path / "none.pt")
    with pytest.raises(AttachError, match="has no KD layers"):
        bake(Net(4))


@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
def test_a_baked_student_is_free_of_hooks_and_can_be_scripted():
    student, kd = attached()
    student.eval()
    expected = student(IMAGES)
    baked = bake(student)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in baked.modules())
    assert torch.equal(baked(IMAGES), expected)
    assert torch.equal(student(IMAGES), expected)
    assert list(slots(student)) == ["first", "last"]
    scripted = torch.jit.script(baked)
    torch.testing.assert_close(scripted(IMAGES), expected)


class Pair(nn.Module):
    """Takes two arguments and returns a dict."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)

    def forward(self, x, shift):
        return {"mask": shift, "maps": (self.conv(x) + shift,)}


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.pair(x, shift=0.5)["maps"][0].mean((2, 3)))


def test_points_with_several_arguments_and_nested_outputs(tmp_path):
    student = Outer().eval()
    attach_kd(student, at=[KDPoint("pair", num_templates=6)], example=IMAGES)
    expected = student(IMAGES)
    assert torch.equal(bake(student)(IMAGES), expected)
    save_student(student, tmp_path / "student.pt")
    assert torch.equal(load_student(Outer().eval(), tmp_path / "student.pt")(IMAGES), expected)


def test_the_epsilon_of_a_layers_batch_norm_is_kept(tmp_path):
    student, _ = attached()
    for slot in slots(student).values():  # scripts that follow TensorFlow change all norms
        slot.norm.eps = 0.1
    save_student(student.eval(), tmp_path / "student.pt")
    loaded = load_student(Net(4).eval(), tmp_path / "student.pt")
    assert [slot.norm.eps for slot in slots(loaded).values()] == [0.1, 0.1]
    torch.testing.assert_close(loaded(IMAGES), student(IMAGES))


def test_a_file_of_format_version_1_still_loads():
    # Written by kdlayers 0.1; later versions must go on reading it.
    folder = Path(__file__).parents[1] / "data"
    seen = torch.load(folder / "student_v1_outputs.pt", weights_only=True)
    student = load_student(Net(4).eval(), folder / "student_v1.pt")
    assert [layer.alpha for layer in slots(student).values()] == [0.5, 1.0]
    torch.testing.assert_close(student(seen["images"]), seen["logits"])
