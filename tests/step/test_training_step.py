"""A whole training step against a reference implementation, in float64."""

import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, DecisionTargets, KDPoint, attach_kd
from tests import reference
from tests.nets import Net, batch


def plain_step(student, teacher, images, labels, decisions, codebook, alphas):
    """Loss of letKD-2 without a hook: the student's modules are called one by one."""
    layers = {k: dict(m.named_parameters()) for k, m in kd_layers(student).items()}
    features, first_scores = reference.kd_layer(
        student.first(student.stem(images)), layers["first"], alphas[0]
    )
    features, last_scores = reference.kd_layer(student.last(features), layers["last"], alphas[1])
    logits = student.head(features.mean((2, 3)))
    with torch.no_grad():
        inner = teacher.first(teacher.stem(images))
        outer = teacher.last(inner)
        rows, row_labels = rows_of(F.avg_pool2d(inner, 2)), labels.repeat_interleave(16)
        decided = reference.decision_assignment(
            rows,
            row_labels,
            decisions.projection,
            decisions.shift,
            decisions.centers,
            decisions.decisions,
        )
        assigned = reference.codebook_assignment(rows_of(F.avg_pool2d(outer, 2)), codebook.centers)
    return (
        reference.template_kl(rows_of(first_scores), decided)
        + reference.template_kl(rows_of(last_scores), assigned)
        + F.cross_entropy(logits, labels)
    )


def rows_of(maps):
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def kd_layers(student):
    named = dict(student.named_modules())
    return {"first": named["first.2.kd"], "last": named["last.1.kd"]}


def test_loss_and_every_gradient_equal_the_written_out_method():
    torch.manual_seed(5)
    # The teacher's grid is twice the student's: it is average-pooled.
    student, teacher = Net(4, stride=1).double(), Net(7, stride=1).double()
    teacher.first[1].stride = (1, 1)
    images, labels = batch(6)
    images = images.double()
    decisions, codebook = DecisionTargets(2, components=2), CodebookTargets(5)
    points = [
        KDPoint("first", targets=decisions, alpha=0.6),
        KDPoint("last", targets=codebook, alpha=1.0),
    ]
    kd = attach_kd(student, teacher, points, example=images)
    kd.fit([batch(12, seed=1)], progress=False)
    assert decisions.centers.dtype == codebook.centers.dtype == torch.float64
    student.train()
    teacher.eval()

    loss = F.cross_entropy(student(images), labels) + kd.loss(labels)
    ours = torch.autograd.grad(loss, list(student.parameters()))
    kd.detach()
    for layer in kd_layers(student).values():
        layer.requires_grad_(True)
    # In the plain step the layers run as written out; as modules of the student they must not.
    take_hooks_off(student)
    plain = plain_step(student, teacher, images, labels, decisions, codebook, (0.6, 1.0))
    theirs = torch.autograd.grad(plain, list(student.parameters()))

    assert abs(loss.item() - plain.item()) < 1e-9
    for (name, _), mine, other in zip(student.named_parameters(), ours, theirs, strict=True):
        torch.testing.assert_close(
            mine, other, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


def take_hooks_off(student):
    for module in student.modules():
        module._forward_hooks.clear()


def test_alpha_zero_supervises_and_leaves_the_output():
    student, teacher = Net(4), Net(7)
    images, labels = batch()
    before = student.eval()(images)
    kd = attach_kd(
        student, teacher, [KDPoint("last", targets=CodebookTargets(4), alpha=0.0)], example=images
    )
    kd.fit([(images, labels)], progress=False)
    assert torch.equal(student(images), before)
    student.train()
    student(images)
    kd.loss(labels).backward()
    layer = student.get_submodule("last.1.kd")
    assert layer.head.weight.grad.abs().sum() > 0
    assert student.stem[0].weight.grad.abs().sum() > 0
