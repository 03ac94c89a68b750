"""Tools that change KD layers after attach: pruning, weight norm, adapters, fusing, freezing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from kdlayers import CodebookTargets, KDLayer, KDPoint, attach_kd, bake, fold
from kdlayers._step.sites import slots
from kdlayers.errors import AttachError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def reference(x, head, value, layer):
    """A reference implementation of the layer with these matrices."""
    cosine = lambda u, m, s: s * F.normalize(u, dim=-1) @ F.normalize(m, dim=1).T  # noqa: E731
    scores = cosine(x.movedim(1, -1), head, layer.head.scale)
    norm = layer.norm
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    assignment = F.relu((scores - norm.running_mean) * gain + norm.bias)
    return x + cosine(assignment, value, layer.value.scale).movedim(-1, 1)


class Adapter(nn.Module):
    """Scores, or values, with a low-rank part added, as LoRA does."""

    def __init__(self, base, made, axis):
        super().__init__()
        self.base = base
        self.axis = axis
        self.low = nn.Parameter(torch.randn(made, 2))
        self.up = nn.Parameter(torch.randn(2, base.weight.shape[1]))

    def forward(self, x):
        added = x.movedim(self.axis, -1) @ self.up.T @ self.low.T
        return self.base(x) + added.movedim(-1, self.axis)


@pytest.mark.parametrize("mode", ["eval", "no_grad", "train"])
@pytest.mark.parametrize("part", ["head", "value"])
@pytest.mark.parametrize("tool", ["prune", "weight_norm", "parametrize"])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_recomputed_weights_are_used_after_every_step(tool, part, mode):
    layer = KDLayer(4, 64, memory="low").eval()
    module = getattr(layer, part)
    if tool == "prune":
        prune.l1_unstructured(module, "weight", 0.5)
        source = module.weight_orig
    elif tool == "weight_norm":
        nn.utils.weight_norm(module, "weight")
        source = module.weight_v
    else:
        parametrizations.weight_norm(module, "weight")
        source = module.parametrizations.weight.original1
    with torch.no_grad():
        source.normal_()  # as an optimiser's step
    weight = source.detach() * module.weight_mask if tool == "prune" else source.detach()
    head = weight if part == "head" else layer.head.weight
    value = weight if part == "value" else layer.value.weight
    if mode == "train":
        layer.train()
        layer.norm.eval()
    x = torch.randn(3, 4, 5, 5)
    with torch.set_grad_enabled(mode != "no_grad"):
        torch.testing.assert_close(layer(x), reference(x, head, value, layer))
    if mode == "train":
        layer(x).square().sum().backward()
        assert source.grad.abs().sum() > 0


@pytest.mark.parametrize("train", [False, True])
def test_an_adapter_round_head_or_value_is_called(train):
    student = Net(4)
    point = KDPoint("last", targets=CodebookTargets(8))
    kd = attach_kd(student, Net(6), [point], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    layer = slots(student)["last"]
    layer.head, layer.value = Adapter(layer.head, 8, 1), Adapter(layer.value, 5, -1)
    student.train(train)
    if train:
        student(IMAGES)
        kd.loss(LABELS).backward()
        assert layer.head.low.grad.abs().sum() > 0
        return
    seen = []
    for part in (layer.head, layer.value):
        part.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        student(IMAGES)
        assert len(seen) == 2
        baked = bake(student)
        torch.testing.assert_close(baked(IMAGES), student(IMAGES))
    with pytest.raises(AttachError, match="'last' cannot be folded with hooks on its head"):
        fold(student)


def test_folding_pruned_layers_is_an_error():
    student = Net(4).eval()
    attach_kd(student, at=[KDPoint("last", num_templates=8)], example=IMAGES)
    layer = slots(student)["last"]
    prune.l1_unstructured(layer.head, "weight", 0.5)
    with pytest.raises(AttachError, match=r"torch\.nn\.utils\.prune\.remove"):
        fold(student)
    prune.remove(layer.head, "weight")
    torch.testing.assert_close(fold(student)(IMAGES), student(IMAGES))


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.relu(self.norm(self.conv(x))).mean((2, 3)))


def test_fusing_modules_at_a_point_raises_a_clear_error():
    student = ConvNet().eval()
    attach_kd(student, at=[KDPoint("relu", num_templates=8)], example=IMAGES)
    fused = torch.ao.quantization.fuse_modules(student, [["conv", "norm", "relu"]])
    with pytest.raises(AttachError, match=r"'relu' is missing: .*fuse before attach_kd, or .*bake"):
        fused(IMAGES)
    baked = bake(student)
    fused = torch.ao.quantization.fuse_modules(baked, [["conv", "norm"]])
    torch.testing.assert_close(fused(IMAGES), student(IMAGES))


@pytest.mark.parametrize("made", ["student", "bake", "fold"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_graphs_of_torch_fx(made):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    from torchvision.models.feature_extraction import create_feature_extractor

    student = Net(4).eval()
    kd = attach_kd(student, at=[KDPoint("last", num_templates=8, alpha=5.0)], example=IMAGES)
    plain = copy.deepcopy(student)
    expected = student(IMAGES)
    model = {"student": lambda s: s, "bake": bake, "fold": fold}[made](student)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), expected)
    features = []
    hook = model.last.register_forward_hook(lambda m, a, out: features.append(out))
    model(IMAGES)
    hook.remove()
    extracted = create_feature_extractor(model, ["last"])(IMAGES)["last"]
    torch.testing.assert_close(extracted, features[0])
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (IMAGES,))
    prepared(IMAGES)
    kd.remove()
    error = (convert_fx(prepared)(IMAGES) - expected).std()
    # Without the layer the output would be another one.
    assert error < 0.05 * (student(IMAGES) - expected).std()
    assert "__module__" not in vars(student.last[-1])
    assert "__module__" in vars(plain.last[-1])


def test_an_existing_attribute_kd_is_an_error():
    student = Net(4)
    student.last[-1].kd = "mine"
    with pytest.raises(AttachError, match="already has an attribute 'kd'"):
        attach_kd(student, at=[KDPoint("last", num_templates=8)], example=IMAGES)
    assert student.last[-1].kd == "mine"
