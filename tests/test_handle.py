"""The life of a handle in a training loop, and every way of using it wrongly that it notices."""

import copy
import gc
import warnings

import pytest
import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, DecisionTargets, DistillLoss, KDLoss, KDPoint, attach_kd
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    AttachError,
    CaptureError,
    FitError,
    KDLayersWarning,
    NotFittedError,
    StaleCaptureError,
)
from tests.attach_tester import Frozen
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(fit=True, losses=(), **kwargs):
    student, teacher = Net(4), Net(6)
    point = KDPoint("last", targets=CodebookTargets(4), **kwargs)
    kd = attach_kd(student, teacher, [point], losses=losses, example=IMAGES)
    if fit:
        kd.fit([(IMAGES, LABELS)])
    return student.train(), teacher, kd


def step(student, kd, optimiser, use_kd=True):
    optimiser.zero_grad()
    loss = F.cross_entropy(student(IMAGES), LABELS)
    if use_kd:
        loss = loss + kd.loss(LABELS)
    loss.backward()
    optimiser.step()
    return loss.detach()


def test_terms_add_up_and_weights_follow_the_step():
    student, teacher, kd = attached(losses=[KDLoss(weight=lambda step: 0.5 * step)])
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    for number in range(3):
        step(student, kd, optimiser)
        terms = kd.terms
        assert set(terms) == {
            "TemplateLoss.last",
            "TemplateLoss.last.weighted",
            "KDLoss",
            "KDLoss.weighted",
            "total",
        }
        assert not any(value.requires_grad for value in terms.values())
        torch.testing.assert_close(terms["KDLoss.weighted"], 0.5 * number * terms["KDLoss"])
        torch.testing.assert_close(
            terms["total"], terms["TemplateLoss.last.weighted"] + terms["KDLoss.weighted"]
        )
    assert kd.step == 3
    student(IMAGES)
    with torch.no_grad():
        expected = F.kl_div(
            F.log_softmax(student(IMAGES) / 4, 1),
            F.softmax(teacher.eval()(IMAGES) / 4, 1),
            reduction="batchmean",
        )
    kd.loss(LABELS)
    torch.testing.assert_close(kd.terms["KDLoss"], 16 * expected)


def test_teacher_is_left_as_it_was_found():
    student, teacher, kd = attached()
    teacher.first.train()
    teacher.last.eval()
    teacher.head.weight.requires_grad_(False)
    frozen = Frozen(teacher)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(10):
        step(student, kd, optimiser)
    assert frozen.unchanged(teacher)
    assert not any(key.startswith("teacher") for key in student.state_dict())


def test_random_state_is_not_disturbed_by_loss_or_fit():
    student, _, kd = attached(fit=False)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=2, shuffle=True
    )
    state = torch.get_rng_state()
    kd.fit(loader)
    student(IMAGES)
    kd.loss(LABELS)
    assert torch.equal(state, torch.get_rng_state())


def test_fit_is_the_same_for_the_same_seed():
    centers = []
    for draws in (0, 3):
        torch.manual_seed(0)
        _, _, kd = attached(fit=False)
        torch.rand(draws)
        loader = torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(IMAGES, LABELS), batch_size=2, shuffle=True
        )
        kd.fit(loader, seed=7)
        centers.append(kd.state_dict()["losses"]["TemplateLoss.last"])
    for key, value in centers[0].items():
        assert torch.equal(value, centers[1][key])


def test_a_step_without_the_kd_loss_is_allowed():
    student, _, kd = attached()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    step(student, kd, optimiser, use_kd=False)
    step(student, kd, optimiser)
    step(student, kd, optimiser, use_kd=False)
    with pytest.raises(CaptureError, match="no training forward"):
        kd.loss(LABELS)


def test_gradient_accumulation_equals_one_backward():
    student, _, kd = attached()
    twin = copy.deepcopy(student)
    for _ in range(2):
        (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
    first = [p.grad.clone() for p in student.parameters()]
    student.load_state_dict(twin.state_dict())
    student.zero_grad()
    losses = [F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS) for _ in range(2)]
    sum(losses).backward()
    for a, p in zip(first, student.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad)


def test_validation_between_forward_and_loss_changes_nothing():
    student, _, kd = attached()
    student(IMAGES)
    expected = kd.loss(LABELS).detach()
    student.load_state_dict(copy.deepcopy(student).state_dict())
    student(IMAGES)
    student.eval()
    with torch.no_grad():
        student(IMAGES[:2])
    student.train()
    torch.testing.assert_close(kd.loss(LABELS).detach(), expected)


def test_forward_that_fails_does_not_stick():
    student, _, kd = attached()
    with pytest.raises(RuntimeError):
        student(IMAGES[:, :2])
    student(IMAGES)
    kd.loss(LABELS)


def test_batch_records_what_root_hooks_cannot_see():
    student, _, kd = attached()
    student(IMAGES)
    expected = kd.loss(LABELS).detach()
    with kd.batch(IMAGES):
        logits = student.forward(IMAGES)
    torch.testing.assert_close(kd.loss(LABELS, logits=logits).detach(), expected)
    with kd.batch(IMAGES):
        student.forward(IMAGES)
    with pytest.raises(CaptureError, match=r"kd\.loss\(y, logits=\.\.\.\)"):
        kd.loss(LABELS)


def no_forward(student, kd):
    kd.loss(LABELS)


def loss_twice(student, kd):
    student(IMAGES)
    kd.loss(LABELS)
    kd.loss(LABELS)


def two_forwards(student, kd):
    student(IMAGES)
    student(IMAGES)
    kd.loss(LABELS)


def forward_in_eval_mode(student, kd):
    student.eval()(IMAGES)
    kd.loss(LABELS)


def forward_without_gradient(student, kd):
    with torch.no_grad():
        student(IMAGES)
    kd.loss(LABELS)


def forward_called_directly(student, kd):
    student.forward(IMAGES)
    kd.loss(LABELS)


def loss_after_backward(student, kd):
    F.cross_entropy(student(IMAGES), LABELS).backward()
    kd.loss(LABELS)


def batch_changed(student, kd):
    images = IMAGES.clone()
    student(images)
    images.mul_(2)
    kd.loss(LABELS)


def other_labels(student, kd):
    student(IMAGES)
    kd.loss(LABELS[:4])


def labels_as_list(student, kd):
    student(IMAGES)
    kd.loss(LABELS.tolist())


def after_detach(student, kd):
    kd.detach()
    student(IMAGES)
    kd.loss(LABELS)


def hook_lost(student, kd):
    student.last[1]._forward_hooks.clear()
    student(IMAGES)
    kd.loss(LABELS)


@pytest.mark.parametrize(
    ("misuse", "error", "sentence"),
    [
        (no_forward, CaptureError, "no training forward of the student since the last"),
        (loss_twice, CaptureError, "no training forward"),
        (two_forwards, StaleCaptureError, r"2 training forwards since .* kd\.clear\(\)"),
        (forward_in_eval_mode, CaptureError, r"eval mode now: call student\.train\(\)"),
        (forward_without_gradient, CaptureError, "in train mode with gradients"),
        (forward_called_directly, CaptureError, r"not student\.forward\(x\)"),
        (loss_after_backward, CaptureError, r"or backward\(\)"),
        (batch_changed, StaleCaptureError, "changed in place after the student's forward"),
        (other_labels, StaleCaptureError, "labels of another batch"),
        (labels_as_list, ArgumentTypeError, "labels as a tensor, got list"),
        (after_detach, AttachError, "this handle was detached"),
        (hook_lost, CaptureError, "hooks were bypassed"),
    ],
)
def test_misuse_is_loud_and_the_next_step_works(misuse, error, sentence):
    student, teacher, kd = attached()
    frozen = Frozen(teacher)
    with pytest.raises(error, match=sentence):
        misuse(student, kd)
    assert frozen.unchanged(teacher)
    if misuse not in (after_detach, hook_lost):
        kd.clear()
        student.train()(IMAGES)
        kd.loss(LABELS).backward()


def test_loss_before_fit():
    student, _, kd = attached(fit=False)
    student(IMAGES)
    with pytest.raises(NotFittedError, match=r"call kd\.fit\(loader\) once before training"):
        kd.loss(LABELS)


@pytest.mark.parametrize(
    ("loader", "error", "sentence"),
    [
        ([], FitError, "empty loader"),
        ([{"image": IMAGES}], ArgumentError, r"expects batches \(images, labels\)"),
        ([(IMAGES * float("nan"), LABELS)], FitError, "(?i)nan"),
        ([(IMAGES[:1, :, :2, :2], LABELS[:1])], FitError, "4 templates|num_templates"),
    ],
)
def test_bad_loaders(loader, error, sentence):
    student, teacher, kd = attached(fit=False)
    frozen = Frozen(teacher)
    with pytest.raises(error, match=sentence):
        kd.fit(loader)
    assert frozen.unchanged(teacher)
    kd.fit([(IMAGES, LABELS)])


def test_one_shot_loader_is_refused_when_a_second_pass_is_needed():
    student, teacher = Net(4), Net(6)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("last", targets=DecisionTargets(1, components=2))],
        example=IMAGES,
    )
    with pytest.raises(FitError, match="pass a DataLoader or a list"):
        kd.fit(item for item in [(IMAGES, LABELS)])


def test_mixed_labels_with_decision_targets_say_what_to_do():
    student, teacher = Net(4), Net(6)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("last", targets=DecisionTargets(1, components=2))],
        example=IMAGES,
    )
    kd.fit([(IMAGES, LABELS)])
    student(IMAGES)
    with pytest.raises((ArgumentError, ArgumentTypeError), match="CodebookTargets"):
        kd.loss(F.one_hot(LABELS, 3).float() * 0.7)


def test_optimiser_made_before_attach_is_noticed():
    student, teacher = Net(4), Net(6)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    step(student, kd, optimiser)
    with pytest.warns(KDLayersWarning, match=r"not TemplateLoss.last.* after attach_kd"):
        step(student, kd, optimiser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(student, kd, optimiser)


class Projected(DistillLoss):
    """A loss with a parameter of its own."""

    def build(self, student, teacher):
        self.scale = torch.nn.Parameter(torch.ones(student.shape[1]))

    def forward(self, student, teacher, targets=None):
        return (student * self.scale - teacher).square().mean()


def test_train_only_parameters_are_the_handles_and_missing_ones_are_noticed():
    student, teacher, kd = attached(losses=[Projected()])
    (parameter,) = kd.parameters()
    assert parameter.shape == (3,)
    assert all(parameter is not p for p in student.parameters())
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    step(student, kd, optimiser)
    with pytest.warns(KDLayersWarning, match=r"not Projected.*kd\.parameters\(\)"):
        step(student, kd, optimiser)
    assert parameter.grad is not None


def test_detach_and_remove():
    student, teacher, kd = attached()
    torch.manual_seed(1)
    plain = Net(4)
    before = {k: v.clone() for k, v in student.state_dict().items() if ".kd." not in k}
    kd.detach()
    kd.detach()
    assert kd.terms == {}
    assert list(kd.parameters()) == []
    assert set(student.state_dict()) - set(plain.state_dict()) == {
        key for key in student.state_dict() if ".kd." in key
    }
    student(IMAGES)
    kd.remove()
    kd.remove()
    plain.load_state_dict(student.state_dict())
    assert torch.equal(plain.eval()(IMAGES), student.eval()(IMAGES))
    assert all(
        torch.equal(student.state_dict()[k], v)
        for k, v in before.items()
        if "num" not in k and "running" not in k
    )


def test_remove_gives_back_bit_identical_outputs():
    student, teacher = Net(4).eval(), Net(6)
    before = student(IMAGES)
    kd = attach_kd(student, teacher, {"first": "first", "last": "last"}, example=IMAGES)
    assert not torch.equal(student(IMAGES), before)
    kd.remove()
    assert torch.equal(student(IMAGES), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_a_dropped_handle_stops_recording_and_frees_the_teacher():
    import weakref

    student, teacher, kd = attached()
    seen = weakref.ref(teacher)
    logits = student(IMAGES)
    del teacher, kd, logits
    gc.collect()
    assert seen() is None
    assert not student._forward_hooks
    assert not student._forward_pre_hooks
    student(IMAGES)


def test_captures_are_freed_by_loss():
    import weakref

    student, _, kd = attached()
    logits = student(IMAGES)
    scores = weakref.ref(kd._tape.features["scores of last"])
    loss = kd.loss(LABELS)
    del loss, logits
    gc.collect()
    assert scores() is None


def test_summary_tells_costs_and_state():
    student, _, kd = attached(fit=False)
    text = kd.summary()
    assert "last" in text
    assert "not fitted" in text
    # 2KC + 2K + 2 parameters, 2KC multiply-adds at each of 4 x 4 positions; K = 4, C = 5.
    assert "50" in text.split()
    assert "640" in text.split()
    kd.fit([(IMAGES, LABELS)])
    assert "not fitted" not in kd.summary()
    assert repr(kd) == kd.summary()
