"""Warnings point at the user's line; targets fitted to an earlier teacher cause a warning."""

import copy
import gc
import warnings
from inspect import currentframe

import pytest
import torch

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    DistillLoss,
    DKDLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    StudentFriendlyKDLoss,
    attach_kd,
    attach_mutual,
)
from kdlayers import functional as KF
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch

IMAGES, LABELS = batch()
LOADER = [(IMAGES, LABELS)]


def here():
    """The number of the line that calls this."""
    return currentframe().f_back.f_lineno


def fit_decisions():
    targets = DecisionTargets(1, components=5)
    kd = attach_kd(Net(), Net(6), [KDPoint("last", targets=targets)], example=IMAGES)
    return kd.fit(LOADER), here()


def fit_codebook():
    teacher = Net(6)
    torch.nn.init.zeros_(teacher.last[0].weight)
    kd = attach_kd(Net(), teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    return kd.fit(LOADER), here()


def fit_alone():
    return CodebookTargets(5).fit([(torch.eye(2).repeat(9, 1), None)]), here()


def forgotten_parameters(wrap=lambda function: function):
    student = Net()
    kd = attach_kd(student, Net(6), losses=[StudentFriendlyKDLoss()], example=IMAGES)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    loss = wrap(kd.loss)
    for _ in range(2):
        student(IMAGES)
        value, line = loss(LABELS), here()
        value.backward()
        optimiser.step()
    return None, line


def forgotten_under_the_compiler():
    return forgotten_parameters(lambda function: torch.compile(function, backend="eager"))


def attached_twice():
    student = Net()
    earlier = attach_kd(student, Net(6), "first", example=IMAGES)
    return (earlier, attach_kd(student, Net(6), "last", example=IMAGES)), here()


def peers_attached_before():
    student = Net()
    earlier = attach_kd(student, Net(6), "first", example=IMAGES)
    return (earlier, attach_mutual(student, Net(6), example=IMAGES)), here()


def two_classes():
    logits = torch.randn(4, 2)
    return KF.dkd(logits, -logits, torch.zeros(4).long()), here()


def two_classes_in_a_loss():
    logits = torch.randn(4, 2)
    return DKDLoss()(logits, -logits, torch.zeros(4).long()), here()


def two_classes_in_kd_loss():
    student = Net(classes=2)
    kd = attach_kd(student, Net(classes=2), losses=[DKDLoss()], example=IMAGES)
    student(IMAGES)
    return kd.loss(LABELS.clamp(max=1)), here()


def a_loss_of_ones_own():
    class Own(DistillLoss):
        def forward(self, student, teacher, targets=None):
            lines.append(here() + 1)
            return KF.dkd(student, teacher, targets)

    lines, student = [], Net(classes=2)
    kd = attach_kd(student, Net(classes=2), losses=[Own()], example=IMAGES)
    student(IMAGES)
    return kd.loss(LABELS.clamp(max=1)), lines[0]


@pytest.mark.parametrize(
    "warned",
    [
        fit_decisions,
        fit_codebook,
        fit_alone,
        forgotten_parameters,
        forgotten_under_the_compiler,
        attached_twice,
        peers_attached_before,
        two_classes,
        two_classes_in_a_loss,
        two_classes_in_kd_loss,
        a_loss_of_ones_own,
    ],
)
def test_warnings_point_at_the_users_line(warned):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")  # also what torch.compile says of itself
        _, line = warned()
    ours = [warning for warning in seen if warning.category is KDLayersWarning]
    assert [(warning.filename, warning.lineno) for warning in ours] == [(__file__, line)]


# ---------------------------------------------------------------- targets of an earlier teacher


def attached(teacher, targets=None, at="last", losses=()):
    points = [] if targets is None else [KDPoint(at, at, targets=targets)]
    student = Net().train()
    return student, attach_kd(student, teacher, points, losses=losses, example=IMAGES)


def test_warns_when_targets_were_fitted_to_another_teacher():
    teacher, other, targets = Net(6), Net(6), CodebookTargets(4)
    attached(teacher, targets)[1].fit(LOADER)
    centers = targets.centers.clone()
    with pytest.warns(
        KDLayersWarning,
        match=r"TemplateLoss.last keeps what it learnt from 'last' of another teacher .*refit=True",
    ):
        student, kd = attached(other, targets)
    kd.fit(LOADER)
    assert torch.equal(targets.centers, centers)
    kd.fit(LOADER, refit=True)
    assert not torch.equal(targets.centers, centers)
    attached(other, targets)  # what it knows is of this teacher now
    student(IMAGES)
    kd.loss(LABELS).backward()


def test_warns_when_the_earlier_teacher_was_deleted():
    targets = CodebookTargets(4)
    attached(Net(6), targets)[1].fit(LOADER)
    gc.collect()
    with pytest.warns(KDLayersWarning, match="'last' of another teacher"):
        attached(Net(6), targets)


def test_warns_when_targets_were_fitted_to_another_point():
    teacher, targets = Net(6), CodebookTargets(4)
    attached(teacher, targets, "first")[1].fit(LOADER)
    with pytest.warns(KDLayersWarning, match="learnt from 'first' of this teacher in an earlier"):
        attached(teacher, targets)


def test_warns_when_a_loss_was_fitted_to_another_teacher():
    loss = InheritExploreLoss(factor_channels=2, at="last", epochs=1)
    attached(Net(6), losses=[loss])[1].fit(LOADER)
    with pytest.warns(KDLayersWarning, match=r"InheritExploreLoss.last keeps what it learnt"):
        attached(Net(6), losses=[loss])


class Drawn(Net):
    """Reads the rows of the images in a random order in eval mode too."""

    def forward(self, x):
        return super().forward(x[:, :, torch.randperm(x.shape[2])].cumsum(2))


def test_warns_of_a_teacher_that_is_random_in_eval_mode():
    with pytest.warns(KDLayersWarning, match=r"two forwards of the teacher \(Drawn\) in eval mode"):
        attach_kd(Net(4), teacher := Drawn(6), losses=[KDLoss()], example=IMAGES)
    assert teacher.training
    models = Net(4), Net(6)
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach_kd(*models, losses=[KDLoss()], example=IMAGES)
    assert torch.equal(torch.get_rng_state(), state)


def test_intended_uses_do_not_warn():
    teacher, targets = Net(6), CodebookTargets(4)
    attached(teacher, targets)[1].fit(LOADER)
    for _ in range(2):  # several students of one teacher
        student, kd = attached(teacher, targets, losses=[KDLoss()])
        kd.fit([])  # nothing is missing
        student(IMAGES)
        kd.loss(LABELS).backward()
    attached(teacher, CodebookTargets(4).fit([(torch.randn(40, 7), None)]))  # fitted by hand
    loaded = CodebookTargets(4)
    loaded.load_state_dict(targets.state_dict())
    attached(Net(6), loaded)
    attached(Net(6), copy.deepcopy(targets))
