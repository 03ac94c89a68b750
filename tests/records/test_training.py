"""Training from a record: the numbers of the live teacher, without running it."""

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from kdlayers import (
    AttentionTransferLoss,
    CodebookTargets,
    DecisionTargets,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    KDLoss,
    KDPoint,
    RecordedTeacher,
    Renormalize,
    attach_kd,
    open_record,
)
from kdlayers.errors import ArgumentTypeError, AttachError, KDLayersWarning, RecordError
from tests.records.data import FlipAndCrop, Squares


class Net(nn.Module):
    """Two maps and logits; ``stride`` makes its maps smaller than another's."""

    def __init__(self, width, stride=1, norm=True):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, stride, 1), nn.BatchNorm2d(width))
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.second(self.first(x)).relu().mean((2, 3)))


class Tokens(nn.Module):
    """A class token and 16 patches, then a layer over the tokens."""

    num_prefix_tokens = 1

    def __init__(self, width):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.second = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1)
        return self.fc(self.second(tokens)[:, 0])


EXAMPLE = torch.zeros(2, 3, 8, 8)
LOSSES = {
    "logits": lambda: {"losses": [KDLoss(), DKDLoss()]},
    "codebook": lambda: {"at": [KDPoint("second", targets=CodebookTargets(6))]},
    "decisions": lambda: {"at": [KDPoint("second", targets=DecisionTargets(2, components=2))]},
    "features": lambda: {"losses": [FitNetLoss(at="second")]},
    "vectors": lambda: {
        "losses": [
            FeatureLoss(at="second", name="patches"),
            FeatureLoss(at="second", tokens="pooled", normalize_teacher=True, name="mean"),
        ]
    },
    "attention": lambda: {"losses": [AttentionTransferLoss(at=("first", "second"))]},
    "all": lambda: {
        "at": [KDPoint("second", targets=CodebookTargets(6))],
        "losses": [KDLoss(), FitNetLoss(at="second"), AttentionTransferLoss(at="second")],
    },
}
TEACHERS = {
    "same grid": lambda: Net(8),
    "smaller maps": lambda: Net(8, stride=2),
    "tokens": lambda: Tokens(8),
}


def setup(losses, teacher, tmp_path, *, student=None, **record):
    """Two equal students on one teacher, and a record that the second reads."""
    torch.manual_seed(0)
    teacher = TEACHERS[teacher]() if isinstance(teacher, str) else teacher
    dataset = Squares(32, transform=FlipAndCrop())
    plain = [(torch.stack([image[:, :8, :8] for image in dataset.images]), torch.arange(32) % 4)]
    handles = []
    student = student or Net(6)
    for copied in (student, copy.deepcopy(student)):
        torch.manual_seed(1)
        kd = attach_kd(copied, teacher, **LOSSES[losses](), example=EXAMPLE)
        kd.fit(plain)
        handles.append(kd)
    settings = {"views": 3, "dtype": "float32", "batch_size": 16} | record
    return handles, handles[1].record(dataset, tmp_path / "record", **settings), teacher


def step(kd, x, y, **recorded):
    kd.student.zero_grad()
    loss = F.cross_entropy(kd.student(x), y) + kd.loss(y, **recorded)
    loss.backward()
    return loss.detach(), [p.grad for p in (*kd.student.parameters(), *kd.parameters())]


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("losses", LOSSES)
def test_float32_records_give_the_live_teachers_numbers_bitwise(losses, teacher, tmp_path):
    if teacher == "tokens" and losses in ("attention", "decisions"):
        pytest.skip("attention transfer reads `first`, which the token model lacks")
    (live, other), recorded, _ = setup(losses, teacher, tmp_path)
    recorded.set_epoch(1)
    for x, y, key in DataLoader(recorded, batch_size=16):
        loss, grads = step(live, x, y)
        again, regrads = step(other, x, y, recorded=key)
        assert torch.equal(loss, again)
        assert live.terms.keys() == other.terms.keys()
        for grad, regrad in zip(grads, regrads, strict=True):
            assert torch.equal(grad, regrad)


def test_the_teacher_does_not_run(tmp_path, monkeypatch):
    (_, kd), recorded, teacher = setup("all", "same grid", tmp_path)
    monkeypatch.setattr(teacher, "forward", None)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    loss, _ = step(kd, x, y, recorded=key)
    assert loss.isfinite()


def test_float16_differs_by_what_rounding_does(tmp_path):
    (live, kd), recorded, _ = setup("all", "same grid", tmp_path, dtype="float16")
    for x, y, key in DataLoader(recorded, batch_size=16):
        loss, _ = step(live, x, y)
        rounded, _ = step(kd, x, y, recorded=key)
        assert abs(loss - rounded) < 2e-3 * loss
        assert not torch.equal(loss, rounded)


def test_float16_rounds_each_value_as_the_page_says(tmp_path):
    (_, kd), recorded, _ = setup("all", "same grid", tmp_path / "exact")
    rounded = kd.record(
        recorded.dataset, tmp_path / "rounded", views=3, dtype="float16", batch_size=16
    )
    exact, near = (data.reader.read(range(96)) for data in (recorded, rounded))
    for name, values in exact.items():
        limit = (5e-4 * values.abs()).clamp(min=3e-8)
        assert ((near[name].float() - values).abs() <= limit).all()


def test_the_means_of_two_teachers_are_recorded(tmp_path):
    torch.manual_seed(0)
    student, teachers = Net(6), [Net(8), Net(4)]
    dataset = Squares(16, transform=FlipAndCrop())
    options = {"losses": [KDLoss(), KDLoss(teacher_index=1, name="second")], "example": EXAMPLE}
    kd = attach_kd(student, teachers, teacher_weights=[1.0, 3.0], **options)
    recorded = kd.record(dataset, tmp_path / "record", views=2, dtype="float32")
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    student(x)
    live, terms = kd.loss(y), kd.terms
    student(x)
    assert torch.equal(kd.loss(y, recorded=key), live)
    assert terms.keys() == kd.terms.keys()


def test_fit_learns_from_a_record_what_it_learns_from_the_teacher(tmp_path):
    (live, kd), _, _ = setup("codebook", "same grid", tmp_path)
    plain = Squares(32, size=8)
    record = kd.record(plain, tmp_path / "plain", views=1, dtype="float32", batch_size=16)
    live.fit(DataLoader(plain, batch_size=16), refit=True)
    kd.fit(DataLoader(record, batch_size=16), refit=True)
    ours, theirs = (h.state_dict()["losses"] for h in (kd, live))
    for name, state in ours.items():
        for key, tensor in state.items():
            assert torch.equal(tensor, theirs[name][key])


@pytest.mark.parametrize("size", [16, 32], ids=["two batches", "one batch"])
def test_epochs_without_set_epoch_are_warned_of_once(size, tmp_path):
    (_, kd), recorded, _ = setup("logits", "same grid", tmp_path)
    batches = DataLoader(recorded, batch_size=size, shuffle=True)

    def epoch():
        for x, y, key in batches:
            step(kd, x, y, recorded=key)

    epoch()
    with pytest.warns(KDLayersWarning, match="same one of its 3 views; call"):
        epoch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epoch()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("way", ["set_epoch", "one view", "one batch"])
def test_what_shows_no_view_twice_unnoticed_is_not_warned_of(way, tmp_path):
    (_, kd), recorded, _ = setup(
        "logits", "same grid", tmp_path, views=1 if way == "one view" else 3
    )
    for epoch in range(3):
        if way == "set_epoch":
            recorded.set_epoch(epoch)
        for x, y, key in DataLoader(recorded, batch_size=16):
            step(kd, x, y, recorded=key)
            if way == "one batch":
                break


def test_integers_of_numpy_make_the_same_record(tmp_path):
    kd = attach_kd(Net(6), Net(8), losses=[KDLoss()], example=EXAMPLE)
    data = Squares(6, transform=FlipAndCrop())
    two, four, three = np.array([2, 4, 3])
    kd.record(data, tmp_path / "python", views=2, batch_size=4, topk=3)
    kd.record(data, tmp_path / "numpy", views=two, batch_size=four, topk=three)
    for file in (tmp_path / "python").iterdir():
        assert file.read_bytes() == (tmp_path / "numpy" / file.name).read_bytes()


def test_topk_keeps_the_loss_near(tmp_path):
    (live, kd), recorded, _ = setup("logits", "same grid", tmp_path, topk=3)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    loss, _ = step(live, x, y)
    near, _ = step(kd, x, y, recorded=key)
    torch.testing.assert_close(loss, near, atol=1e-4, rtol=1e-4)  # one class alone is the rest


def test_another_teacher_is_refused(tmp_path):
    (_, kd), recorded, teacher = setup("logits", "same grid", tmp_path)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    with torch.no_grad():
        teacher.fc.bias[0] += 1e-3
    student = Net(6)
    other = attach_kd(student, teacher, **LOSSES["logits"](), example=EXAMPLE)
    student(x)
    with pytest.raises(RecordError, match="another teacher 0: its weights differ"):
        other.loss(y, recorded=key)


def test_another_transform_for_the_teacher_is_refused(tmp_path):
    (_, kd), recorded, teacher = setup("logits", "same grid", tmp_path)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    options = {**LOSSES["logits"](), "example": EXAMPLE}
    transform = Renormalize(student=([0.5] * 3, [0.5] * 3), teacher=([0.0] * 3, [0.1] * 3))
    other = attach_kd(Net(6), teacher, teacher_transform=transform, **options)
    other.student(x)
    with pytest.raises(RecordError, match="teacher_transform was None, and is Renormalize"):
        other.loss(y, recorded=key)
    again = other.record(
        recorded.dataset, tmp_path / "again", views=1, dtype="float32", progress=False
    )
    x, y, key = next(iter(DataLoader(again, batch_size=16)))
    assert torch.equal(step(other, x, y, recorded=key)[0], step(other, x, y)[0])


def test_losses_that_were_not_recorded_are_refused(tmp_path):
    (_, kd), recorded, teacher = setup("logits", "same grid", tmp_path)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    student = Net(6)
    other = attach_kd(student, teacher, losses=[FitNetLoss(at="second")], example=EXAMPLE)
    student(x)
    with pytest.raises(RecordError, match="second of teacher 0, which the record"):
        other.loss(y, recorded=key)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.flip(-1),
        lambda x: 0.7 * x + 0.3 * x.flip(0),
        lambda x: x.roll(1, 0),
    ],
    ids=["mirrored", "mixup", "shuffled"],
)
def test_other_images_than_those_of_the_keys_are_refused(change, tmp_path):
    (_, kd), recorded, _ = setup("logits", "same grid", tmp_path)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    kd.student(change(x))
    with pytest.raises(RecordError, match="not the image that the record"):
        kd.loss(y, recorded=key)
    recorded.check_inputs = False
    kd.student(change(x))
    assert kd.loss(y, recorded=key).isfinite()


def test_keys_of_fewer_images_are_refused(tmp_path):
    (_, kd), recorded, _ = setup("logits", "same grid", tmp_path)
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    kd.student(x)
    with pytest.raises(RecordError, match="15 keys for a forward of 16 images"):
        kd.loss(y, recorded=key[1:])


def test_a_second_call_opens_the_record_without_running(tmp_path, monkeypatch):
    (_, kd), recorded, teacher = setup("logits", "same grid", tmp_path)
    calls = []
    teacher.register_forward_hook(lambda *_: calls.append(1))
    again = kd.record(
        recorded.dataset, tmp_path / "record", views=3, dtype="float32", batch_size=16
    )
    assert len(calls) <= 1  # one image, for the shapes
    assert torch.equal(again[3][0], recorded[3][0])
    opened = open_record(tmp_path / "record", recorded.dataset)
    assert torch.equal(opened[3][2], recorded[3][2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"views": 0}, "views must be"),
        ({"batch_size": -1}, "batch_size must be"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"topk": 4}, "keeps everything"),
    ],
)
def test_arguments_are_checked(options, message, tmp_path):
    kd = attach_kd(Net(6), Net(8), losses=[KDLoss()], example=EXAMPLE)
    with pytest.raises(ValueError, match=message):
        kd.record(Squares(8, transform=FlipAndCrop()), tmp_path / "record", **options)


def test_a_size_that_is_no_integer_is_a_type_error_as_everywhere(tmp_path):
    kd = attach_kd(Net(6), Net(8), losses=[KDLoss()], example=EXAMPLE)
    with pytest.raises(ArgumentTypeError, match="batch_size must be an integer"):
        kd.record(Squares(8, transform=FlipAndCrop()), tmp_path / "record", batch_size=1.5)


def test_a_detached_handle_cannot_record(tmp_path):
    kd = attach_kd(Net(6), Net(8), losses=[KDLoss()], example=EXAMPLE)
    kd.detach()
    with pytest.raises(AttachError, match="needs a teacher"):
        kd.record(Squares(8, size=8), tmp_path / "record")


def test_a_record_takes_the_place_of_the_teacher(tmp_path):
    (live, kd), recorded, teacher = setup("all", "smaller maps", tmp_path)
    student = copy.deepcopy(kd.student)
    kd.remove()
    fresh = Net(6)
    fresh.load_state_dict(kd.student.state_dict())
    torch.manual_seed(1)
    absent = attach_kd(
        fresh, RecordedTeacher(tmp_path / "record"), **LOSSES["all"](), example=EXAMPLE
    )
    fresh.load_state_dict(student.state_dict())
    absent.load_state_dict(live.state_dict())
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    loss, grads = step(live, x, y)
    again, regrads = step(absent, x, y, recorded=key)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, grads, regrads))
    fresh(x)
    with pytest.raises(AttachError, match="is a record and cannot run"):
        absent.loss(y)


def test_class_tokens_and_patches_of_one_point_are_recorded_apart(tmp_path, monkeypatch):
    losses = [FeatureLoss(at="second", tokens=t, name=t) for t in ("patch", "cls", "pooled")]
    monkeypatch.setitem(LOSSES, "tokens", lambda: {"losses": copy.deepcopy(losses)})
    (live, other), recorded, _ = setup("tokens", "tokens", tmp_path)
    for x, y, key in DataLoader(recorded, batch_size=16):
        torch.testing.assert_close(step(other, x, y, recorded=key), step(live, x, y))
