"""A record in the place of the teacher, against the live teacher."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kdlayers import (
    ChannelWiseLoss,
    CodebookTargets,
    FeatureLoss,
    KDLoss,
    KDPoint,
    RecordedTeacher,
    attach_kd,
)
from kdlayers.errors import ArgumentError, RecordError
from tests.records.test_training import EXAMPLE, LOSSES, Net, Tokens, setup, step


class Maps(nn.Module):
    """Class maps ``[B, 5, H, W]``."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x):
        return self.head(self.body(x).relu())


def data():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(8, 3, 8, 8, generator=generator), torch.arange(8) % 4)


def both(student, teacher, losses, path):
    """The terms of the live teacher, and of its record in its place."""
    again, example = copy.deepcopy(student), torch.zeros(2, 3, 8, 8)
    live = attach_kd(student, teacher, losses=losses(), example=example)
    recorded = live.record(data(), path, views=1, dtype="float32", progress=False)
    kd = attach_kd(again, RecordedTeacher(path), losses=losses(), example=example)
    kd.load_state_dict(live.state_dict())
    x, _, key = next(iter(DataLoader(recorded, batch_size=8)))
    for handle, keys in ((live, {}), (kd, {"recorded": key})):
        handle.student(x)
        handle.loss(**keys)
    return live.terms, kd.terms


@pytest.mark.parametrize("loss", [KDLoss, ChannelWiseLoss])
def test_class_maps_are_those_of_the_live_teacher(loss, tmp_path):
    torch.manual_seed(0)
    live, recorded = both(Maps(4), Maps(6), lambda: [loss()], tmp_path / "r")
    assert live == recorded


def test_topk_of_class_maps_is_refused_before_anything_is_written(tmp_path):
    kd = attach_kd(Maps(4), Maps(6), losses=[KDLoss()], example=torch.zeros(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match="but these are class maps"):
        kd.record(data(), tmp_path / "r", views=1, topk=2, progress=False)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("student", [Net, Tokens])
@pytest.mark.parametrize("tokens", [("cls",), ("cls", "pooled"), ("patch", "cls")], ids="-".join)
def test_class_tokens_are_those_of_the_live_teacher(tokens, student, tmp_path):
    torch.manual_seed(0)

    def losses():
        torch.manual_seed(1)
        return [FeatureLoss(at="second", tokens=each, name=each) for each in tokens]

    live, recorded = both(student(6), Tokens(8), losses, tmp_path / "r")
    assert live == recorded


def test_registers_are_not_taken_for_a_class_token(tmp_path):
    teacher = Tokens(8)
    teacher.has_class_token = False  # as timm says of a model with registers alone
    with pytest.raises(ArgumentError, match="neither"):
        both(Net(6), teacher, lambda: [FeatureLoss(at="second", tokens="cls")], tmp_path / "a")
    kd = attach_kd(
        Net(6), teacher, losses=[FeatureLoss(at="second")], example=torch.zeros(2, 3, 8, 8)
    )
    kd.record(data(), tmp_path / "b", views=1, progress=False)
    absent, loss = RecordedTeacher(tmp_path / "b"), FeatureLoss(at="second", tokens="cls")
    with pytest.raises(ArgumentError, match="neither"):
        attach_kd(Net(6), absent, losses=[loss], example=torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize("images", [1, 5])
def test_a_recorded_teacher_takes_an_example_of_any_number_of_images(images, tmp_path):
    (live, _), recorded, _ = setup("all", "same grid", tmp_path)
    place = {
        "teacher": RecordedTeacher(tmp_path / "record"),
        "example": torch.zeros(images, 3, 8, 8),
    }
    absent = attach_kd(Net(6), **place, **LOSSES["all"]())
    absent.student.load_state_dict(live.student.state_dict())
    absent.load_state_dict(live.state_dict())
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    assert torch.equal(step(absent, x, y, recorded=key)[0], step(live, x, y)[0])


def test_a_recorded_teacher_fits_from_its_record(tmp_path):
    (_, kd), recorded, teacher = setup("codebook", "same grid", tmp_path)
    student = Net(6)
    absent = attach_kd(
        student, RecordedTeacher(tmp_path / "record"), **LOSSES["codebook"](), example=EXAMPLE
    )
    absent.fit(DataLoader(recorded, batch_size=16))
    x, y, key = next(iter(DataLoader(recorded, batch_size=16)))
    assert step(absent, x, y, recorded=key)[0].isfinite()


@pytest.mark.parametrize("options", [{"teacher_weights": [1.0]}, {"teacher_transform": abs}])
def test_what_was_applied_while_recording_is_refused_later(options, tmp_path):
    setup("logits", "same grid", tmp_path)
    with pytest.raises(ValueError, match="when the teacher was recorded"):
        attach_kd(
            Net(6),
            RecordedTeacher(tmp_path / "record"),
            losses=[KDLoss()],
            example=EXAMPLE,
            **options,
        )


@pytest.mark.parametrize("held", [False, True], ids=["logits only", "another point"])
def test_a_point_that_the_record_lacks(held, tmp_path):
    torch.manual_seed(0)
    losses = [FeatureLoss(at="body")] if held else [ChannelWiseLoss()]
    kd = attach_kd(Maps(4), Maps(6), losses=losses, example=EXAMPLE)
    kd.record(data(), tmp_path / "r", views=1, progress=False)
    has = "'body'" if held else "no features, only logits"
    for options in ({"losses": [FeatureLoss(at="head")]}, {"at": ["head"]}):
        with pytest.raises(RecordError, match=rf"'head' of the teacher \(it has {has}\); record"):
            attach_kd(Maps(4), RecordedTeacher(tmp_path / "r"), example=EXAMPLE, **options)


class Unusual(Dataset):
    """Gives an image alone, or an image with a label and its index."""

    def __init__(self, more):
        self.more = more

    def __len__(self):
        return 8

    def __getitem__(self, index):
        image, label = data()[index]
        return (image, label, index) if self.more else image


@pytest.mark.parametrize("more", [False, True])
def test_fit_finds_the_keys_behind_whatever_the_data_set_gives(more, tmp_path):
    torch.manual_seed(0)
    teacher = Net(6).eval()

    def attached(which):
        return attach_kd(
            Net(4), which, [KDPoint("first", targets=CodebookTargets(4))], example=EXAMPLE
        )

    recorded = attached(teacher).record(
        Unusual(more), tmp_path / "r", views=1, dtype="float32", progress=False
    )
    live, kd = attached(teacher), attached(RecordedTeacher(tmp_path / "r"))
    live.fit([data()[:][0]], progress=False)
    kd.fit(DataLoader(recorded, batch_size=8), progress=False)
    ours, theirs = (h.state_dict()["losses"]["TemplateLoss.first"] for h in (kd, live))
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key])
