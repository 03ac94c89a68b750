"""The alternatives in the benchmarks compute the same values as the library."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import (
    AEKTLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    DISTLoss,
    DKDLoss,
    KDLayer,
    KDLoss,
    MutualLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    StudentFriendlyKDLoss,
)
from kdlayers.losses import TemplateLoss
from tests.benchmark_modules import load


def copy_weights(plain, layer):
    pairs = {
        plain.templates: layer.head.weight,
        plain.template_scale: layer.head.scale,
        plain.norm.weight: layer.norm.weight,
        plain.norm.bias: layer.norm.bias,
        plain.values: layer.value.weight,
        plain.value_scale: layer.value.scale,
    }
    with torch.no_grad():
        for ours, theirs in pairs.items():
            ours.copy_(theirs)
    return pairs


@pytest.mark.parametrize("size", [(5, 6), (12,)], ids=["maps", "tokens"])
@pytest.mark.parametrize("kind", ["codebook", "decisions"])
def test_the_plain_layer_computes_what_the_library_does(size, kind):
    torch.manual_seed(0)
    cases, plain_code = load("_cases"), load("_plain")
    case = cases.Case(None, 6, size, 8, 10, 24, classes=6, subclasses=4, layers=2)
    tokens = len(size) == 1
    labels = torch.tensor([0, 5, 2, 2, 1, 3])
    x = cases.features(case, 8)[:, 1:] if tokens else cases.features(case, 8)
    f = cases.features(case, 10)[:, 1:] if tokens else cases.features(case, 10)
    rows = f.flatten(0, 1) if tokens else f.movedim(1, -1).flatten(0, 2)
    if kind == "codebook":
        targets = CodebookTargets(24, sharpness=1.0).fit([(rows, None)])
    else:
        owners = labels.repeat_interleave(len(rows) // 6)
        owners = torch.cat([owners, torch.tensor([4]).expand(30)])
        more = torch.cat([rows, torch.randn(30, 10)])
        targets = DecisionTargets(4, components=4).fit([(more, owners)])
    layer = KDLayer(8, 24, channel_dim=-1 if tokens else 1)
    plain = plain_code.PlainLayer(8, 24)
    pairs = copy_weights(plain, layer)

    ours_x, plain_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, scores = layer(ours_x), layer.head(ours_x)
    theirs_f = f
    if not tokens:
        scores, theirs_f = scores.movedim(1, -1), f.movedim(1, -1)
    ours_loss = TemplateLoss(template_targets=targets)(scores, theirs_f, labels)

    theirs, _ = plain(plain_x)
    point = plain_code.PlainPoint(plain, dict(targets.state_dict()))
    point.on_student(plain, (), plain_x)
    point.on_teacher(plain, (), f)
    plain_loss = point.loss(labels, prefix=0)

    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain_loss, ours_loss, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(x)
    ((ours * upstream).sum() + ours_loss).backward()
    ((theirs * upstream).sum() + plain_loss).backward()
    torch.testing.assert_close(plain_x.grad, ours_x.grad, rtol=1e-4, atol=1e-5)
    for mine, library in pairs.items():
        torch.testing.assert_close(mine.grad, library.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 4), (9,)], ids=["maps", "tokens"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_of_each_variant_has_the_same_loss_and_gradients(size, layers):
    cases = load("_cases")
    case = cases.Case(None, 6, size, 8, 10, 24, classes=6, subclasses=4, layers=layers)
    labels = torch.tensor([0, 5, 2, 2, 1, 3])
    results = {}
    for variant in cases.VARIANTS[1:]:
        torch.manual_seed(0)
        student, teacher, x = cases.make_networks(case)
        loss, added = cases.add(case, variant, student, teacher.eval(), x)
        if variant == "plain":
            weights = added
        else:
            tensors = [p for n, p in student.named_parameters() if ".kd." in n]
            weights = [tensors[i] for i in order(student)]
            with torch.no_grad():
                for mine, first in zip(weights, results["plain"][2], strict=True):
                    mine.copy_(first)
        x.requires_grad_()
        total = F.cross_entropy(student(x), labels) + loss(x, labels)
        total.backward()
        results[variant] = total, [x.grad, *(w.grad for w in weights)], weights
    total, gradients, _ = results.pop("plain")
    assert results
    for ours, found, _ in results.values():
        torch.testing.assert_close(ours, total, rtol=1e-5, atol=1e-5)
        for mine, expected in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def order(student):
    """Indices of the student's KD parameters in the order of PlainLayer's."""
    names = [n for n, _ in student.named_parameters() if ".kd." in n]
    ends = ("head.weight", "head.scale", "value.weight", "value.scale", "norm.weight", "norm.bias")
    points = list(dict.fromkeys(n.split(".")[0] for n in names))
    return [
        next(i for i, n in enumerate(names) if n.startswith(point) and n.endswith(end))
        for point in points
        for end in ends
    ]


FORMS = ("chi2", "ratio_sq", "ratio", "is")
TEXTBOOK = {
    "kd": (lambda: KDLoss(), lambda t: t.kd),
    "mutual": (lambda: MutualLoss(), lambda t: t.mutual),
    "dkd": (lambda: DKDLoss(), lambda t: t.dkd),
    "standardised": (lambda: KDLoss(standardize=True), lambda t: t.standardized_kd),
    "student-friendly": (lambda: StudentFriendlyKDLoss(), lambda t: t.StudentFriendly(7)),
    **{f"aekt {f}": (lambda f=f: AEKTLoss(form=f, alpha=1.0, beta=8.0, gamma=1.0),
                     lambda t, f=f: t.AEKT(7, f)) for f in FORMS},
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTBOOK)
def test_the_textbook_losses_are_the_librarys(name):
    torch.manual_seed(0)
    ours, theirs = TEXTBOOK[name][0](), TEXTBOOK[name][1](load("_textbook"))
    student, teacher = 2 * torch.randn(5, 7), 3 * torch.randn(5, 7)
    labels = torch.tensor([0, 6, 3, 3, 1])
    if isinstance(theirs, nn.Module):
        ours.build(student, teacher)
        source = ours.simplifier if name == "student-friendly" else ours
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        theirs.load_state_dict(source.state_dict())
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    first, second = ours(a, teacher, labels), theirs(b, teacher, labels)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    first.backward()
    second.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


RELATIONS = {
    "dist": (DISTLoss, (5, 7)),
    "rkd": (RKDLoss, (5, 7)),
    "similarity": (SimilarityPreservingLoss, (5, 7, 3, 2)),
    "channelwise": (ChannelWiseLoss, (5, 7, 3, 2)),
    "pixels": (KDLoss, (5, 7, 3, 2)),
}


@pytest.mark.parametrize("name", RELATIONS)
def test_the_textbook_relations_are_the_librarys(name):
    torch.manual_seed(0)
    make, shape = RELATIONS[name]
    student, teacher = 2 * torch.randn(shape), 3 * torch.randn(shape)
    a, b = student.clone().requires_grad_(), student.clone().requires_grad_()
    first = make()(a, teacher)
    second = getattr(load("_textbook_relations"), name)(b, teacher, None)
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    first.backward()
    second.backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
