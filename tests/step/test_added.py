"""`kd.layers` and `kd.added_parameters`: what is new, for optimisers of every kind."""

import copy

import pytest
import torch

from kdlayers import AEKTLoss, CodebookTargets, KDLayer, KDPoint, attach_kd
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch


def attached(before=None):
    images, labels = batch(12)
    student = Net()
    made = before(student) if before else None
    points = [KDPoint(name, targets=CodebookTargets(4)) for name in ("last", "first")]
    kd = attach_kd(student, Net(6), points, losses=[AEKTLoss(beta=1.0)], example=images)
    kd.fit([(images, labels)], progress=False)
    return student.train(), kd, images, labels, made


def test_layers_are_those_in_the_student_in_forward_order():
    student, kd, *_ = attached()
    assert list(kd.layers) == ["first", "last"]
    assert all(isinstance(layer, KDLayer) for layer in kd.layers.values())
    inside = [m for name, m in student.named_modules() if name.endswith(".kd")]
    assert [m.head for m in inside] == [layer.head for layer in kd.layers.values()]
    kd.layers["first"].alpha = 0.25
    assert kd.layers["first"].alpha == inside[0].alpha == 0.25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:`torch.jit.script:FutureWarning")
def test_layers_compile_and_follow_the_options_of_the_student():
    torch._dynamo.reset()
    _, kd, *_ = attached()
    layer, x = kd.layers["first"], torch.randn(2, 4, 6, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for alpha in (0.25, 0.5):
        kd.layers["first"].alpha = alpha
        for training in (True, False):
            layer.train(training)
            torch.testing.assert_close(compiled(x), layer(x))
        program = torch.export.export(layer, (x,), strict=True).module()
        for other in (program, torch.jit.script(layer), copy.deepcopy(layer)):
            torch.testing.assert_close(other(x), layer(x))
    plain = KDLayer(4, 4, alpha=alpha).eval()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x))


def test_layers_survive_detach_but_not_remove():
    _, kd, *_ = attached()
    kd.detach()
    assert list(kd.layers) == ["first", "last"]
    assert kd.added_parameters()
    kd.remove()
    assert kd.layers == {}
    assert kd.added_parameters() == []


def test_layers_are_only_those_of_the_handle():
    images, _ = batch()
    student = Net()
    first = attach_kd(student, at=[KDPoint("first", num_templates=3)], example=images)
    second = attach_kd(student, at=[KDPoint("last", num_templates=3)], example=images)
    assert (list(first.layers), list(second.layers)) == (["first"], ["last"])


def test_added_parameters_are_those_missing_in_the_plain_student():
    plain = {name for name, _ in Net().named_parameters()}
    student, kd, *_ = attached()
    new = [p for name, p in student.named_parameters() if name not in plain]
    added = kd.added_parameters()
    assert len(added) == len({id(p) for p in added}) == 2 * 6 + 2
    assert {id(p) for p in added} == {id(p) for p in [*new, *kd.parameters()]}
    parts = kd.added_parameters(decay=True), kd.added_parameters(decay=False)
    assert {id(p) for part in parts for p in part} == {id(p) for p in added}
    assert all(p.dim() == 2 for p in parts[0])
    assert all(p.dim() == 1 for p in parts[1])
    kd.layers["first"].head.weight.requires_grad_(False)
    assert len(kd.added_parameters()) == len(added) - 1


def test_an_existing_optimiser_trains_added_parameters():
    def sgd(student):
        return torch.optim.SGD(student.parameters(), lr=0.1)

    student, kd, images, labels, optimizer = attached(sgd)
    optimizer.add_param_group({"params": kd.added_parameters(), "lr": 0.2})
    before = [p.detach().clone() for p in kd.added_parameters()]
    for _ in range(3):
        loss = torch.nn.functional.cross_entropy(student(images), labels) + kd.loss(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # and no warning that parameters were left out
    assert not any(torch.equal(p, b) for p, b in zip(kd.added_parameters(), before, strict=True))
    every = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in every} == {id(p) for p in [*student.parameters(), *kd.parameters()]}


def test_scales_and_norms_without_decay_do_not_change():
    def sgd(student):
        return torch.optim.SGD(student.parameters(), lr=0.1, weight_decay=0.5)

    _, kd, _, _, optimizer = attached(sgd)
    optimizer.add_param_group({"params": kd.added_parameters(decay=True)})
    optimizer.add_param_group({"params": kd.added_parameters(decay=False), "weight_decay": 0.0})
    before = copy.deepcopy([p.detach() for p in kd.added_parameters()])
    for p in kd.added_parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for now, old in zip(kd.added_parameters(), before, strict=True):
        wanted = old * (1 - 0.1 * 0.5) if now.dim() == 2 else old
        torch.testing.assert_close(now.detach(), wanted)


def test_the_warning_shows_the_line_to_add():
    def sgd(student):
        return torch.optim.SGD(student.parameters(), lr=0.1)

    student, kd, images, labels, optimizer = attached(sgd)
    loss = torch.nn.functional.cross_entropy(student(images), labels) + kd.loss(labels)
    loss.backward()
    optimizer.step()
    student(images)
    with pytest.warns(KDLayersWarning, match=r"add_param_group\(\{\"params\": kd.added_param"):
        kd.loss(labels)


def test_timms_optimisers_give_scales_no_decay_and_layers_their_blocks_rate():
    timm = pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2, param_groups_layer_decay

    student = timm.create_model("test_resnet", num_classes=3)
    kd = attach_kd(student, at=[KDPoint("layer3", num_templates=4)])
    optimizer = create_optimizer_v2(student, opt="sgd", lr=0.1, weight_decay=0.05)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    for p in kd.added_parameters():
        assert decay[id(p)] == (0.05 if p.dim() > 1 else 0.0)
    scales = {}
    for group in param_groups_layer_decay(student, weight_decay=0.05, layer_decay=0.5):
        scales |= {id(p): group["lr_scale"] for p in group["params"]}
    names = dict(student.named_parameters())
    own = next(
        p for name, p in names.items() if name.startswith("layer3.0.") and ".kd." not in name
    )
    assert {scales[id(p)] for p in kd.added_parameters()} == {scales[id(own)]}
    assert scales[id(own)] < 1
