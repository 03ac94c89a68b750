"""Several views or batches per step: all orders of forwards and losses, against plain sums."""

import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    DecisionTargets,
    FeatureLoss,
    FitNetLoss,
    KDLoss,
    KDPoint,
    attach_kd,
)
from kdlayers._step.sites import slots
from kdlayers.errors import StaleCaptureError
from tests.nets import Net, batch

VIEWS = [batch(seed=seed)[0] for seed in (0, 1)]
LABELS = batch()[1]


def attached():
    student, teacher = Net(4), Net(6)
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    losses = [AEKTLoss(beta=1.0), FitNetLoss(at="first")]
    kd = attach_kd(student, teacher, points, losses=losses, example=VIEWS[0])
    kd.fit([(VIEWS[0], LABELS), (VIEWS[1], LABELS)])
    return student.train(), kd


def parameters(student, kd):
    return [*student.parameters(), *kd.parameters()]


def whole(student, kd, images, labels):
    return F.cross_entropy(student(images), labels) + kd.loss(labels)


def separately(student, kd, batches, scale=1.0):
    """Sum of the gradients of one forward, one loss and one backward for each batch."""
    found = []
    for images, labels in batches:
        loss = scale * whole(student, kd, images, labels)
        found.append(torch.autograd.grad(loss, parameters(student, kd)))
    return [sum(parts) for parts in zip(*found, strict=True)]


def compare(student, kd, expected):
    for p, grad in zip(parameters(student, kd), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-5)


BATCHES = [(view, LABELS) for view in VIEWS]


def two_losses_one_backward(student, kd):
    """Forward, loss, forward, loss, backward."""
    first = whole(student, kd, VIEWS[0], LABELS)
    second = whole(student, kd, VIEWS[1], LABELS)
    (first + second).backward()


def two_backwards(student, kd):
    """Gradient accumulation: forward, loss, backward, twice."""
    for view in VIEWS:
        whole(student, kd, view, LABELS).backward()


def logits_kept(student, kd):
    """The cross-entropy of both views at the end, the KD loss right after each forward."""
    logits, kd_losses = [], []
    for view in VIEWS:
        logits.append(student(view))
        kd_losses.append(kd.loss(LABELS))
    (sum(F.cross_entropy(z, LABELS) for z in logits) + sum(kd_losses)).backward()


def taught_ahead(student, kd):
    """The teacher runs on a view before the student does."""
    for view in VIEWS:
        kd.teach(view)
        whole(student, kd, view, LABELS).backward()


def inside_batch(student, kd):
    """Both forwards in one with block each, and logits passed on."""
    losses = []
    for view in VIEWS:
        with kd.batch(view):
            logits = student.forward(view)
        losses.append(F.cross_entropy(logits, LABELS) + kd.loss(LABELS, logits=logits))
    sum(losses).backward()


@pytest.mark.parametrize(
    "style", [two_losses_one_backward, two_backwards, logits_kept, taught_ahead, inside_batch]
)
def test_two_views_give_the_sum_of_their_gradients(style):
    student, kd = attached()
    expected = separately(student, kd, BATCHES)
    style(student, kd)
    compare(student, kd, expected)
    assert kd.step == 4


def test_views_in_one_batch_equal_the_mean_of_two_without_batch_statistics():
    student, kd = attached()
    student.stem[1].eval()  # the statistics of a batch are not those of its halves
    for layer in slots(student).values():
        layer.norm.eval()
    expected = separately(student, kd, BATCHES, scale=0.5)
    whole(student, kd, torch.cat(VIEWS), LABELS.repeat(2)).backward()
    compare(student, kd, expected)


def test_a_view_without_distillation():
    """A second, strongly augmented view for the labels alone: kd.clear() says so."""
    student, kd = attached()
    expected = separately(student, kd, BATCHES[:1])
    plain = torch.autograd.grad(
        F.cross_entropy(student(VIEWS[1]), LABELS), list(student.parameters()), allow_unused=True
    )
    kd.clear()
    loss = whole(student, kd, VIEWS[0], LABELS)
    loss = loss + F.cross_entropy(student(VIEWS[1]), LABELS)
    loss.backward()
    for p, grad, more in zip(student.parameters(), expected, plain, strict=False):
        torch.testing.assert_close(p.grad, grad + (0 if more is None else more))


def test_both_forwards_before_the_losses_are_refused():
    student, kd = attached()
    logits = [student(view) for view in VIEWS]
    with pytest.raises(StaleCaptureError, match=r"2 training forwards .* after each forward"):
        kd.loss(LABELS)
    assert len(logits) == 2


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("losses", [[KDLoss()], [KDLoss(), FeatureLoss(at="last")]])
def test_logits_of_one_forward_of_several_inside_batch_are_refused(losses, given):
    student = Net(4).train()
    kd = attach_kd(student, Net(6), losses=losses, example=VIEWS[0])
    with kd.batch(VIEWS[0]):
        logits = [student(view) for view in VIEWS]
    with pytest.raises(StaleCaptureError, match=r"2 training forwards inside kd\.batch\(x\), and"):
        kd.loss(LABELS, logits=logits[given])


def test_logits_of_all_forwards_inside_batch_equal_those_of_one_forward():
    student = Net(4).train()
    student.stem[1].eval()  # the statistics of a batch are not those of its halves
    kd = attach_kd(student, Net(6), losses=[KDLoss()], example=VIEWS[0])
    student(torch.cat(VIEWS))
    expected = kd.loss()
    with kd.batch(torch.cat(VIEWS)):
        logits = torch.cat([student(view) for view in VIEWS])
        with torch.no_grad():
            student(VIEWS[0])
    torch.testing.assert_close(kd.loss(logits=logits), expected)


@pytest.mark.parametrize("parts", [2, 3])
def test_accumulation_over_parts_of_a_batch(parts):
    """Losses divided by the number of parts, one optimiser step for all of them."""
    student, kd = attached()
    chunks = list(zip(VIEWS[0].chunk(parts), LABELS.chunk(parts), strict=True))
    expected = separately(student, kd, chunks, scale=1 / parts)
    optimiser = torch.optim.SGD(parameters(student, kd), lr=0.1)
    before = [p.detach().clone() for p in parameters(student, kd)]
    optimiser.zero_grad()
    for images, labels in chunks:
        (whole(student, kd, images, labels) / parts).backward()
    optimiser.step()
    for p, old, grad in zip(parameters(student, kd), before, expected, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * grad, rtol=1e-5, atol=1e-6)
