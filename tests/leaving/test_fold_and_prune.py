"""Leaving: folded and pruned students."""

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from kdlayers import KDPoint, attach_kd, fold, load_student, prune_templates, save_student
from kdlayers._step.sites import slots
from kdlayers.errors import ArgumentError, ArgumentTypeError, AttachError, FitError
from tests.nets import Net, batch

IMAGES, LABELS = batch(8)


def trained(templates=12, alpha=0.8):
    """A detached student whose batch norms have seen data, and whose thresholds differ."""
    student = Net(6)
    points = [KDPoint(n, num_templates=templates, alpha=alpha) for n in ("first", "last")]
    kd = attach_kd(student, at=points, example=IMAGES)
    for _ in range(5):
        student.train()(IMAGES)
    kd.detach()
    with torch.no_grad():
        for layer in slots(student).values():
            layer.norm.weight.uniform_(0.5, 2)
            layer.norm.bias.copy_(torch.linspace(-9, 1, templates))
            layer.value.scale.fill_(1.7)
    return student.eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_folded_outputs_are_equal_up_to_rounding(dtype):
    student = trained().to(dtype)
    images = IMAGES.to(dtype)
    folded = fold(student)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(folded(images), student(images), rtol=0, atol=tolerance)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())
    assert not folded.training
    plain = sum(p.numel() for p in Net(6).parameters())
    assert sum(p.numel() for p in folded.parameters()) == plain
    exported = torch.export.export(folded, (images,))
    torch.testing.assert_close(exported.module()(images), folded(images))


def test_folded_zero_positions_pass_unchanged():
    student = trained()
    with torch.no_grad():
        for layer in slots(student).values():
            layer.norm.bias.fill_(-100)
    plain = Net(6).eval()
    plain.load_state_dict({k: v for k, v in student.state_dict().items() if ".kd." not in k})
    assert torch.equal(fold(student)(IMAGES), plain(IMAGES))


def firing(student, name):
    """Which templates fire anywhere on the images, by running the layer's parts one by one."""
    seen = []
    layer = slots(student)[name]
    hook = layer.norm.register_forward_hook(
        lambda m, a, out: seen.append((out > 0).float().mean(0))
    )
    with torch.no_grad():
        student(IMAGES)
    hook.remove()
    return seen[0]


def test_pruning_templates_that_never_fire_keeps_the_outputs():
    student = trained().double()
    before = student(IMAGES.double())
    global_images = IMAGES.double()
    fires = {}
    for name, layer in slots(student).items():
        rows = []
        hook = layer.norm.register_forward_hook(lambda m, a, out, r=rows: r.append(out > 0))
        student(global_images)
        hook.remove()
        fires[name] = int(rows[0].any(0).sum())
    total = sum(p.numel() for p in student.parameters())
    report = prune_templates(student, [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])])
    torch.testing.assert_close(student(IMAGES.double()), before, rtol=0, atol=1e-12)
    for layer in report:
        assert layer.before == 12
        assert layer.after == fires[layer.name] + 1
        assert slots(student)[layer.name].head.num_templates == layer.after
    assert sum(p.numel() for p in student.parameters()) == total - sum(r.parameters for r in report)
    assert [r.macs for r in report] == [
        2 * (r.before - r.after) * c for r, c in zip(report, (6, 7), strict=True)
    ]


def test_a_pruned_student_saves_loads_and_trains(tmp_path):
    student = trained()
    prune_templates(student, [IMAGES])
    save_student(student, tmp_path / "pruned.pt")
    fresh = load_student(Net(6).eval(), tmp_path / "pruned.pt")
    assert torch.equal(fresh(IMAGES), student(IMAGES))
    student.train()(IMAGES).sum().backward()
    assert all(p.grad is not None for p in student.parameters())
    for layer in slots(student).values():
        assert torch.equal(layer.norm.bias.grad[-1], torch.zeros(()))


def test_a_budget_removes_templates_that_rarely_fire():
    student = trained()
    share = firing(student, "first")
    between = share[share > 0].median().item()
    (first, _) = prune_templates(student, [IMAGES], budget=between)
    assert first.after == int((share > between).sum()) + 1


def test_nothing_to_prune():
    student = trained()
    with torch.no_grad():
        for layer in slots(student).values():
            layer.norm.bias.fill_(50)
    assert all(r.after == 12 and r.parameters == 0 for r in prune_templates(student, [IMAGES]))


def attached():
    student = Net(6)
    kd = attach_kd(student, Net(4), "last", example=IMAGES)
    return student, kd


def test_refusals():
    with pytest.raises(ArgumentError, match=r"share of positions in \[0, 1\), got 1"):
        prune_templates(trained(), [IMAGES], budget=1)
    with pytest.raises(ArgumentTypeError, match="budget must be a number"):
        prune_templates(trained(), [IMAGES], budget="a tenth")
    with pytest.raises(
        ArgumentTypeError, match=r"prune_templates\(loader\) takes .* got NoneType$"
    ):
        prune_templates(trained(), None)
    with pytest.raises(
        ArgumentError, match=r"^prune_templates\(\) expects .* \[batch\['image'\] for"
    ):
        prune_templates(trained(), [{"image": IMAGES}])
    with pytest.raises(FitError, match="empty loader"):
        prune_templates(trained(), [])
    with pytest.raises(AttachError, match="has no KD layers"):
        prune_templates(Net(), [IMAGES])
    with pytest.raises(AttachError, match="has no KD layers"):
        fold(Net())
    student, kd = attached()
    with pytest.raises(AttachError, match=r"call kd\.detach\(\) before"):
        prune_templates(student, [IMAGES])


def test_pruning_refuses_scores_that_are_not_numbers():
    student = trained()
    before = {key: value.clone() for key, value in student.state_dict().items()}
    images = IMAGES.clone()
    images[3, 0, 2, 2] = float("nan")
    with pytest.raises(FitError, match=r"'first' are NaN or infinite on this data.* nothing was"):
        prune_templates(student, [IMAGES, images])
    assert all(torch.equal(value, before[key]) for key, value in student.state_dict().items())
    with torch.no_grad():
        slots(student)["last"].head.weight[0, 0] = float("inf")
    with pytest.raises(FitError, match="'last' are NaN or infinite"):
        prune_templates(student, [IMAGES])


def test_pruning_leaves_frozen_layers_frozen():
    student = trained()
    slots(student)["first"].requires_grad_(False)
    slots(student)["last"].norm.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    assert all(r.after < r.before for r in prune_templates(student, [IMAGES]))
    assert {name: p.requires_grad for name, p in student.named_parameters()} == before


def test_pruning_refuses_weights_that_are_computed():
    student = trained()
    torch.nn.utils.parametrizations.weight_norm(slots(student)["last"].head)
    with pytest.raises(AttachError, match="'last' has a parametrised or pruned weight"):
        prune_templates(student, [IMAGES])


class Pair(nn.Module):
    """Two students of one class, so that their points have the same names."""

    def __init__(self):
        super().__init__()
        self.left, self.right = trained(), trained()

    def forward(self, x):
        return self.left(x) + self.right(x)


def test_two_students_in_one_model_with_points_of_one_name():
    model = Pair()
    expected = model(IMAGES)
    pruned = {layer.name: layer.after for layer in prune_templates(model, [(IMAGES, LABELS)])}
    parts = {"left": model.left, "right": model.right}
    assert set(pruned) == {f"{n}.{m}" for n in parts for m in ("first.2", "last.1")}
    assert all(1 <= number < 12 for number in pruned.values())
    torch.testing.assert_close(model(IMAGES), expected)
    torch.testing.assert_close(fold(model)(IMAGES), expected, rtol=1e-5, atol=1e-5)
    for part in parts.values():
        for layer in slots(part).values():
            assert layer.head.num_templates < 12
    torch.nn.utils.prune.identity(model.left.last[1].kd.head, "weight")
    with pytest.raises(AttachError, match=r"'left\.last\.1' cannot be folded"):
        fold(model)
