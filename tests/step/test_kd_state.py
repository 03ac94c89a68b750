"""States of handles: damaged states and other sizes raise errors and change nothing."""

import copy
import io

import pytest
import torch
from torch import nn

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDPoint,
    attach_kd,
)
from kdlayers._utils.checksums import checksum
from kdlayers.errors import CheckpointError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(templates=4, teacher=6, fit=True, losses=None):
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(templates)),
    ]
    losses = [FitNetLoss(at="first"), InheritExploreLoss(at="last")] if losses is None else losses
    teacher = Net(teacher) if isinstance(teacher, int) else teacher
    kd = attach_kd(Net(4), teacher, points, losses=losses, example=IMAGES)
    if fit:
        kd.fit([(IMAGES, LABELS)])
    return kd


@pytest.fixture(scope="module")
def fitted():
    torch.manual_seed(0)
    return attached()


def contents(kd):
    return {
        f"{term.name}/{key}": value.clone()
        for term in kd._terms
        for key, value in term.loss.state_dict().items()
    }


def refused(kd, state, sentence):
    before, step = contents(kd), kd.step
    with pytest.raises(CheckpointError, match=sentence):
        kd.load_state_dict(state)
    after = contents(kd)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert kd.step == step


def unsealed(kd):
    """A state of version 1, which had no checksum."""
    state = kd.state_dict()
    del state["checksum"]
    return {**state, "version": 1}


@pytest.mark.parametrize(
    "state", [{}, None, [], 3, "state", nn.Linear(1, 1), {"version": True}, {"version": None}]
)
def test_other_things_are_refused(fitted, state):
    refused(fitted, state, r"version 1 to 4, found .*; pass the result of kd.state_dict\(\)")


def test_a_newer_version_asks_for_a_newer_library(fitted):
    newer = {**fitted.state_dict(), "version": 5}
    refused(fitted, newer, "version 1 to 4, found 5; install a newer kdlayers")


@pytest.mark.parametrize("step", [-1, 2.0, True, None, "3"])
def test_steps_are_whole_numbers_from_zero(fitted, step):
    refused(fitted, {**unsealed(fitted), "step": step}, "no step of 0 or more")
    refused(fitted, {**fitted.state_dict(), "step": step}, "no step of 0 or more")


def test_a_state_of_version_1_loads():
    source, other = attached(), attached(fit=False)
    source.step = 5
    other.load_state_dict(unsealed(source))
    assert other.step == 5
    ours, theirs = contents(other), contents(source)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def places(kd):
    return [(name, key) for name, state in kd.state_dict()["losses"].items() for key in state]


def test_every_change_of_any_entry_is_noticed(fitted):
    for name, key in places(fitted):
        state = fitted.state_dict()
        value = state["losses"][name][key]
        state["losses"][name][key] = ~value if value.dtype == torch.bool else value + 1
        refused(fitted, state, "its checksum is wrong")
        del state["losses"][name][key]
        refused(fitted, state, "its checksum is wrong")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_without_a_checksum_too(fitted, bad):
    count = 0
    for name, key in places(fitted):
        state = unsealed(fitted)
        value = state["losses"][name][key]
        if value.is_floating_point():
            value.view(-1)[-1] = bad
            refused(fitted, state, f"{key}'? has NaN or infinite values")
            count += 1
    assert count > 20


CHANGES = {
    "shape": lambda t: torch.cat([t, t]) if t.dim() else t[None, None],
    "axes": lambda t: t[None],
    "str": lambda t: "much",
    "None": lambda t: None,
    "complex": lambda t: t.to(torch.complex64),
    "kind": lambda t: t.long() if t.is_floating_point() else t.double(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.reshape(-1).to_sparse(),
    "expanded": lambda t: t.reshape(-1)[:1].expand(10**9, 10**9),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_shapes_and_kinds_are_refused_with_and_without_a_checksum(fitted, change):
    for name, key in places(fitted):
        state = unsealed(fitted)
        value = state["losses"][name][key]
        if change == "kind" and key.endswith("counts"):
            continue  # only for reports
        state["losses"][name][key] = CHANGES[change](value)
        refused(fitted, state, "the state of ")
        refused(fitted, {**fitted.state_dict(), "losses": state["losses"]}, "is damaged")


def test_channels_that_are_not_a_split_are_refused(fitted):
    state = unsealed(fitted)
    key = "inherit_channels"
    for wrong in (0, 99, -1):
        state["losses"]["InheritExploreLoss.last"][key][:] = wrong
        refused(fitted, state, "inherit_channels and explore_channels")


def test_a_failure_in_the_last_loss_leaves_the_first(fitted):
    for other in (attached(), attached(fit=False)):
        ready = [term.loss.fitted for term in other._terms]
        state = unsealed(fitted)
        last = list(state["losses"])[-1]
        del state["losses"][last][list(state["losses"][last])[-1]]
        refused(other, state, rf"the state of {last} does not fit: [\s\S]*Missing key")
        assert [term.loss.fitted for term in other._terms] == ready


def test_another_number_of_templates_is_refused(fitted):
    few = attached(3)
    refused(fitted, few.state_dict(), "has 3 templates, but the KD layer there has 4; attach with")
    refused(fitted, unsealed(few), "has 3 templates, but the KD layer there has 4")


def test_another_teacher_width_is_refused(fitted):
    other = attached(teacher=5, losses=[])
    mine = attached(losses=[])
    refused(mine, other.state_dict(), "but the teacher has 6 at 'first'")


class Even(Net):
    """Two maps of the same sizes, ``last`` and ``same``."""

    def __init__(self):
        super().__init__()
        self.same = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU())

    def forward(self, x):
        return self.head(self.same(self.last(self.first(self.stem(x)))).mean((2, 3)))


def test_other_points_of_equal_sizes_are_refused():
    def handle(ours="last", theirs="last", **options):
        losses = [FitNetLoss(at=(ours, theirs), name="hint", **options)]
        return attach_kd(Even(), teachers, losses=losses, example=IMAGES)

    teachers = [Even(), Even()]
    saved = handle()
    handle(teacher_index=0).load_state_dict(saved.state_dict())  # the first is the default
    for other in (handle("same"), handle(theirs="same"), handle(teacher_index=1)):
        refused(other, saved.state_dict(), r"the state of hint is for \['last', 'last', 0\]")
    points = [KDPoint("last", name, targets=CodebookTargets(4)) for name in ("last", "same")]
    first, second = (attach_kd(Even(), teachers[0], [p], example=IMAGES) for p in points)
    first.fit([(IMAGES, LABELS)])
    refused(second, first.state_dict(), r"but this handle has \['last', 'same', 0\]; attach with")


def test_a_state_of_version_3_had_no_points(fitted):
    state = fitted.state_dict()
    del state["points"], state["checksum"]
    state["version"] = 3
    fitted.load_state_dict({**state, "checksum": checksum(state)})


def test_states_are_copies():
    kd = attached()
    state = kd.state_dict()
    before = copy.deepcopy(state)
    with torch.no_grad():
        for parameter in kd.parameters():
            parameter.add_(1)
    changed = contents(kd)
    kd.load_state_dict(state)
    assert any(not torch.equal(value, changed[key]) for key, value in contents(kd).items())
    for name, losses in before["losses"].items():
        assert all(torch.equal(value, state["losses"][name][key]) for key, value in losses.items())


class Best(DistillLoss):
    """Keeps the best value so far, which begins at infinity."""

    def __init__(self):
        super().__init__()
        self.register_buffer("best", torch.tensor(float("inf")))
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, student, teacher, targets=None):
        return (student - teacher).square().mean() * self.scale.mean()


def test_infinity_in_a_buffer_of_a_custom_loss_is_kept():
    kd = attached(losses=[Best()])
    file = io.BytesIO()
    torch.save(kd.state_dict(), file)
    file.seek(0)
    other = attached(fit=False, losses=[Best()], teacher=kd._teachers[0].model)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other._terms[-1].loss.best == float("inf")
    with torch.no_grad():
        kd._terms[-1].loss.scale[0] = float("nan")
    refused(other, kd.state_dict(), "'scale' has NaN or infinite values")


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_loads_into_a_student_that_was_converted_after_attaching(make):
    def started():
        torch.manual_seed(0)
        kd = attach_kd(Net(4), Net(6), losses=[FitNetLoss(at="first")], example=IMAGES)
        kd.student.double()
        parameters = [*kd.student.parameters(), *kd.parameters()]
        return kd.student, kd, make(parameters, lr=0.01)

    def train(student, kd, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            (student(IMAGES.double()).square().mean() + kd.loss(LABELS)).backward()
            optimizer.step()

    whole, stopped = started(), started()
    train(*whole)
    states = [copy.deepcopy(part.state_dict()) for part in whole]
    train(*whole)
    for part, state in zip(stopped, states, strict=True):
        part.load_state_dict(state)
    train(*stopped)
    for ours, theirs in zip(whole[:2], stopped[:2], strict=True):
        assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
