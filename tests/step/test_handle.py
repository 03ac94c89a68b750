"""A handle in a training loop, and all kinds of misuse that it detects."""

import copy
import gc

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    CodebookTargets,
    FeatureLoss,
    KDLayer,
    KDLoss,
    KDPoint,
    attach_kd,
)
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    CaptureError,
    FitError,
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


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        (-1.0, ArgumentError, r"must be 0 or more and finite, got -1\.0; .*max\(0\.0, value\)"),
        (float("nan"), ArgumentError, "must be 0 or more and finite, got nan"),
        (float("inf"), ArgumentError, "must be 0 or more and finite, got inf"),
        (torch.tensor(-0.5), ArgumentError, r"must be 0 or more and finite, got -0\.5"),
        (None, ArgumentTypeError, "must be a number, got NoneType"),
        ("much", ArgumentTypeError, "must be a number, got str"),
        (torch.ones(2), ArgumentTypeError, "must be a number, got Tensor"),
    ],
)
def test_a_function_that_returns_no_weight_is_an_error(wrong, error, sentence):
    losses = [KDLoss(weight=lambda step: wrong if step == 1 else 1.0, name="soft")]
    student, _, kd = attached(losses=losses)
    student(IMAGES)
    kd.loss(LABELS)
    student(IMAGES)
    with pytest.raises(error, match=f"^the weight of soft at step 1 {sentence}"):
        kd.loss(LABELS)


def test_the_weight_of_a_point_is_named_by_the_point():
    student, _, kd = attached(weight=lambda step: -1.0)
    student(IMAGES)
    with pytest.raises(ArgumentError, match=r"the weight of TemplateLoss\.last at step 0"):
        kd.loss(LABELS)


@pytest.mark.parametrize("half", [torch.tensor(0.5), np.float32(0.5), np.array(0.5), True])
def test_a_function_may_return_a_tensor_or_a_numpy_number(half):
    student, _, kd = attached(losses=[KDLoss(weight=lambda step: half)])
    student(IMAGES)
    kd.loss(LABELS)
    assert kd.terms["KDLoss.weighted"] == kd.terms["KDLoss"] * float(half)


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


def test_a_failed_forward_does_not_affect_the_next_step():
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


@pytest.mark.parametrize("losses", [[], [FeatureLoss(at="first")]])
def test_batch_needs_no_logits_if_no_loss_reads_them(losses):
    student, _, kd = attached(losses=losses)
    student(IMAGES)
    expected = kd.loss(LABELS).detach()
    with kd.batch(IMAGES):
        student.forward(IMAGES)
    torch.testing.assert_close(kd.loss(LABELS).detach(), expected)
    with kd.batch(IMAGES):
        student.forward(IMAGES)
    with pytest.raises(StaleCaptureError, match=r"got labels of shape \(4,\) for a forward of 6"):
        kd.loss(LABELS[:4])


def test_batch_asks_for_logits_that_a_loss_reads():
    student, _, kd = attached(losses=[KDLoss()])
    with kd.batch(IMAGES):
        student.forward(IMAGES)
    with pytest.raises(
        CaptureError, match=r"which a loss reads: call kd\.loss\(y, logits=\.\.\.\)"
    ):
        kd.loss(LABELS)


def test_loss_before_fit():
    student, _, kd = attached(fit=False)
    student(IMAGES)
    with pytest.raises(NotFittedError, match=r"is not fitted yet; call kd\.fit\(loader\) once"):
        kd.loss(LABELS)


def test_too_few_positions_for_the_codebook():
    student, teacher, kd = attached(fit=False)
    frozen = Frozen(teacher)
    with pytest.raises(FitError, match="needs at least 4 positions, but the batches hold 1"):
        kd.fit([(IMAGES[:1, :, :2, :2], LABELS[:1])])
    assert frozen.unchanged(teacher)
    kd.fit([(IMAGES, LABELS)])


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
    scores = weakref.ref(kd._tape.forward.scores["last"][0])
    loss = kd.loss(LABELS)
    del loss, logits
    gc.collect()
    assert scores() is None


def test_summary_shows_costs_and_state():
    student, _, kd = attached(fit=False)
    text = kd.summary()
    assert "last" in text
    assert "not fitted" in text
    # 2KC + 2K + 2 parameters, 2KC multiply-adds at each of 4 x 4 positions; K = 4, C = 5.
    assert "50" in text.split()
    assert "640" in text.split()
    own = sum(p.numel() for p in student.parameters()) - 50
    assert f"(kept at inference): 50 parameters on top of its own {own:,}" in text
    assert "size of attach_kd's example" in text
    kd.fit([(IMAGES, LABELS)])
    assert "not fitted" not in kd.summary()
    assert repr(kd) == kd.summary()


def test_slots_are_labelled_and_layers_compute():
    student, _, kd = attached(alpha=0.5)
    held = student.last[1].kd
    images = torch.randn(2, 5, 4, 4)
    assert held(images) is images
    assert not isinstance(held, KDLayer)
    assert not any(isinstance(module, KDLayer) for module in student.modules())
    assert "acts through a hook" in repr(student)
    layer = kd.layers["last"]
    assert isinstance(layer, KDLayer)
    assert layer.head is held.head
    assert layer.alpha == 0.5
    assert list(layer.state_dict()) == list(held.state_dict())
    student.eval()
    before = {}
    hook = student.last.register_forward_hook(lambda m, a, out: before.update(after=out))
    student(IMAGES)
    hook.remove()
    inner = student.last[0](student.first(student.stem(IMAGES))).relu()
    torch.testing.assert_close(kd.layers["last"].eval()(inner), before["after"])
    kd.remove()
    assert kd.layers == {}
