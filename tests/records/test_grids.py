"""The grids of recorded maps, against the live teacher."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from kdlayers import (
    AttentionTransferLoss,
    CodebookTargets,
    FeatureLoss,
    KDPoint,
    RecordedTeacher,
    attach_kd,
)
from kdlayers.errors import KDLayersWarning, RecordError


class Halves(nn.Module):
    """Three maps, each of half the size of the one before, and logits."""

    def __init__(self, width):
        super().__init__()
        self.fine = nn.Conv2d(3, width, 3, 1, 1)
        self.middle = nn.Conv2d(width, width, 3, 2, 1)
        self.coarse = nn.Conv2d(width, width, 3, 2, 1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x):
        return self.fc(self.coarse(self.middle(self.fine(x)).relu()).mean((2, 3)))


def data(size=8, count=8):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 4
    )


def models():
    torch.manual_seed(0)
    return Halves(6), Halves(8)


def attention(*points):
    return [AttentionTransferLoss(at=(point, "fine"), name=point) for point in points]


def attached(pair, losses, teacher=None, size=8):
    return attach_kd(
        pair[0], teacher or pair[1], losses=losses, example=torch.zeros(2, 3, size, size)
    )


def recorded_at(path, pair, losses, dataset=None):
    kd = attached(pair, losses)
    found = kd.record(dataset or data(), path, views=1, dtype="float32", progress=False)
    kd.remove()
    return found


def terms(kd, x, y, **recorded):
    kd.student(x)
    kd.loss(y, **recorded)
    return kd.terms


TRAINED = [("fine", "coarse"), ("coarse", "fine"), ("middle", "coarse"), ("coarse",), ("fine",)]


@pytest.mark.parametrize("absent", [False, True], ids=["live", "RecordedTeacher"])
@pytest.mark.parametrize("trained", TRAINED, ids="-".join)
def test_any_choice_of_the_recorded_losses_reads_its_own_grid(trained, absent, tmp_path):
    pair = models()
    recorded = recorded_at(tmp_path / "r", pair, attention("fine", "middle", "coarse"))
    x, y, key = next(iter(DataLoader(recorded, batch_size=8)))
    expected = terms(attached(pair, attention(*trained)), x, y)
    teacher = RecordedTeacher(tmp_path / "r") if absent else None
    kd = attached(models(), attention(*trained), teacher)
    assert terms(kd, x, y, recorded=key) == expected


@pytest.mark.parametrize("absent", [False, True], ids=["live", "RecordedTeacher"])
def test_a_grid_that_was_not_recorded_is_refused(absent, tmp_path):
    pair = models()
    recorded = recorded_at(tmp_path / "r", pair, attention("coarse"))
    x, y, key = next(iter(DataLoader(recorded, batch_size=8)))
    teacher = RecordedTeacher(tmp_path / "r") if absent else None
    kd = attached(pair, attention("middle"), teacher)
    with pytest.raises(RecordError, match="middle reads the fine of teacher 0, 4 x 4, which"):
        terms(kd, x, y, recorded=key)


def test_the_teachers_own_grid_serves_every_student(tmp_path):
    pair = models()
    recorded = recorded_at(tmp_path / "r", pair, attention("fine"))
    x, y, key = next(iter(DataLoader(recorded, batch_size=8)))
    kd = attached(pair, attention("coarse"))
    assert terms(kd, x, y, recorded=key) == terms(kd, x, y)


def points(first):
    return [
        KDPoint("fine", "fine", targets=first),
        KDPoint("coarse", "fine", targets=CodebookTargets(4)),
    ]


def test_fit_of_one_point_reads_the_grid_of_that_point(tmp_path):
    dataset = data(count=40)
    fitted = CodebookTargets(4)
    fitted.fit([(torch.randn(40, 8), None)])
    states = []
    for name in ("recorded", "live"):
        kd = attach_kd(*models(), points(fitted), example=torch.zeros(2, 3, 8, 8))
        if name == "recorded":
            dataset = kd.record(
                data(count=40), tmp_path / "r", views=1, dtype="float32", progress=False
            )
        kd.fit(
            DataLoader(dataset if name == "recorded" else data(count=40), batch_size=20),
            progress=False,
        )
        states.append(kd._terms[1].loss.template_targets)
    assert int(states[0].counts.sum()) == 40 * 2 * 2
    assert torch.equal(states[0].counts, states[1].counts)
    assert torch.equal(states[0].inertia, states[1].inertia)


# 8 images give grids of 8, 4 and 2; 18 give 18, 9 and 5, and 9 * 2 / 4 rounds to 4.
@pytest.mark.parametrize("absent", [False, True], ids=["live", "RecordedTeacher"])
@pytest.mark.parametrize("beside", [(), ("pooled",)], ids=["alone", "beside a vector"])
def test_a_grid_that_rounds_otherwise_than_the_examples_is_recorded_bitwise(
    beside, absent, tmp_path
):
    def losses():
        at = ("coarse", "middle")
        vectors = [FeatureLoss(at=at, tokens=tokens, name=tokens) for tokens in beside]
        return [FeatureLoss(at=at, name="features"), *vectors]

    pair = models()
    recorded = recorded_at(tmp_path / "r", pair, losses(), data(size=18))
    x, y, key = next(iter(DataLoader(recorded, batch_size=8)))
    live = attached(pair, losses())
    kd = attached(models(), losses(), RecordedTeacher(tmp_path / "r") if absent else None)
    kd.load_state_dict(live.state_dict())
    assert terms(kd, x, y, recorded=key) == terms(live, x, y)


def test_fit_learns_from_the_grid_that_training_compares():
    student, teacher = models()
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("coarse", "middle", targets=CodebookTargets(4))],
        example=torch.zeros(2, 3, 8, 8),
    )
    modes, before = [m.training for m in student.modules()], torch.get_rng_state()
    kd.fit(DataLoader(data(size=18), batch_size=8), progress=False)
    assert int(kd._terms[0].loss.template_targets.counts.sum()) == 8 * 5 * 5
    assert [m.training for m in student.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    x, y = next(iter(DataLoader(data(size=18), batch_size=8)))
    student(x)
    kd.fit(DataLoader(data(size=18), batch_size=8), refit=True, progress=False)
    assert kd.loss(y).isfinite()  # the pending forward is still there


def test_fit_on_images_that_only_the_teacher_takes_warns_of_the_estimated_grid():
    class Fixed(Halves):
        def forward(self, x):
            if x.shape[-1] != 8:
                raise ValueError("8 pixels only")
            return super().forward(x)

    torch.manual_seed(0)
    point = KDPoint("coarse", "middle", targets=CodebookTargets(4))
    kd = attach_kd(Fixed(6), Halves(8), [point], example=torch.zeros(2, 3, 8, 8))
    with pytest.warns(KDLayersWarning, match=r"\(20, 3, 16, 16\).*ValueError: 8 pixels") as caught:
        kd.fit(DataLoader(data(size=16, count=40), batch_size=20), progress=False)
    assert len(caught) == 1  # once for each new size
    assert kd._terms[0].loss.fitted
