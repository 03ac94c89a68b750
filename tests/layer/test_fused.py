"""The fused path against unfused implementations of the layer and the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import CodebookTargets, DecisionTargets, KDLayer, KDPoint, attach_kd, fold
from kdlayers._layer import layer as layer_module
from kdlayers._layer.layer import LayerParts
from kdlayers._layer.recognise import recognise
from kdlayers._targets.divergence import codebook_divergence, decision_divergence
from kdlayers._utils import chunks
from kdlayers.losses import TemplateLoss
from tests import reference
from tests.nets import Net
from tests.targets.test_divergence import assignments

# torch.compile looks at gradients of non-leaf tensors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

PATHS = ("again", "kept", "plain")


@pytest.fixture(params=PATHS)
def path(request, monkeypatch):
    """How the layer computes; in chunks of a few rows."""
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 40)
    use(request.param, monkeypatch)
    return request.param


def use(path, monkeypatch):
    monkeypatch.setattr(layer_module, "CHEAP_CHANNELS", 0 if path == "kept" else 128)
    if path == "plain":
        monkeypatch.setattr(LayerParts, "fuses", lambda *_: False)


def layer_of(channels=5, templates=7, dtype=torch.float64, **options):
    torch.manual_seed(0)
    layer = KDLayer(channels, templates, alpha=0.7, **options).to(dtype)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.norm.weight[0] = 0.0  # a template whose batch norm has shut it off
        layer.norm.bias.normal_()
        layer.value.scale.fill_(1.3)
    return layer


def step(layer, x, seeds, *, kl=True):
    """New features, scores, and all gradients of a fixed linear function of both."""
    x = x.clone().requires_grad_()
    features, found, templates = layer.enhance(x)
    dim = layer.head.channel_dim
    scores = found.movedim(dim, -1)
    scores = scores if templates is None else scores @ templates.T
    value = (features * seeds[0]).sum() + ((scores * seeds[1]).sum() if kl else 0)
    grads = torch.autograd.grad(value, [x, *layer.parameters()], allow_unused=True)
    return features.detach(), scores.detach(), grads


@pytest.mark.parametrize("kl", [True, False])
def test_values_gradients_and_buffers_equal_the_written_out_layer(path, kl):
    layer = layer_of()
    x = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    x[0, :, 0, 0] = 0.0
    seeds = torch.randn_like(x), torch.randn(3, 2, 3, 7, dtype=torch.float64)
    mean, var = layer.norm.running_mean.clone(), layer.norm.running_var.clone()
    features, scores, grads = step(layer, x, seeds, kl=kl)

    parameters = {n: p.detach().requires_grad_() for n, p in layer.named_parameters()}
    other = x.clone().requires_grad_()
    plain_features, plain_scores = reference.kd_layer(other, parameters, 0.7)
    plain_scores = plain_scores.movedim(1, -1)
    value = (plain_features * seeds[0]).sum()
    value = value + ((plain_scores * seeds[1]).sum() if kl else 0)
    plain = torch.autograd.grad(value, [other, *parameters.values()], allow_unused=True)

    torch.testing.assert_close(features, plain_features.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(scores, plain_scores.detach(), rtol=0, atol=1e-12)
    for ours, theirs in zip(grads, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    F.batch_norm(plain_scores.reshape(-1, 7).detach(), mean, var, training=True)
    torch.testing.assert_close(layer.norm.running_mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.norm.running_var, var, rtol=0, atol=1e-12)
    assert layer.norm.num_batches_tracked == 1


def test_float32_is_as_close_to_float64_as_the_plain_path(path):
    exact, layer = layer_of(16, 300), layer_of(16, 300, torch.float32)
    layer.load_state_dict(exact.state_dict())
    for each in (exact, layer):  # no score near zero: rounding does not switch a ReLU
        each.norm.weight.data.fill_(0.1)
        each.norm.bias.data.copy_(torch.where(torch.arange(300) % 3 == 0, -1.0, 1.0))
    x = torch.randn(8, 16, 4, 4).double()
    seeds = torch.randn_like(x), torch.randn(8, 4, 4, 300).double()
    wanted = step(exact, x, seeds)
    got = step(layer, x.float(), (seeds[0].float(), seeds[1].float()))
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=0, atol=1e-6)
    for ours, theirs in zip(got[2], wanted[2], strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm() + 1e-6


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_memory_low_gives_the_numbers_of_normal(channel_dim, monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 4000)
    shape = (4, 200, 3, 3) if channel_dim == 1 else (4, 9, 200)
    x = torch.randn(*shape, dtype=torch.float64)
    seeds = torch.randn_like(x), torch.randn(4, *((3, 3) if channel_dim == 1 else (9,)), 7).double()
    runs = [
        step(layer_of(200, channel_dim=channel_dim, memory=memory), x, seeds)
        for memory in ("normal", "low")
    ]
    for normal, low in zip(runs[0][2], runs[1][2], strict=True):
        torch.testing.assert_close(normal, low, rtol=1e-9, atol=1e-12)
    assert layer_of(200).enhance(x if channel_dim == 1 else x.movedim(-1, 1))[2] is None


def test_gradcheck_in_training(path):
    layer = layer_of(3, 4)
    x = torch.randn(2, 3, 2, 1, dtype=torch.float64, requires_grad=True)
    seeds = torch.randn_like(x), torch.randn(2, 2, 1, 4, dtype=torch.float64)

    def value(x, *parameters):
        names = [name for name, _ in layer.named_parameters()]
        found = torch.func.functional_call(
            Enhance(layer), dict(zip([f"layer.{n}" for n in names], parameters, strict=True)), x
        )
        return (found[0] * seeds[0]).sum() + (found[1] * seeds[1]).sum()

    assert torch.autograd.gradcheck(value, (x, *layer.parameters()))


class Enhance(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        features, found, templates = self.layer.enhance(x)
        scores = found.movedim(1, -1)
        return features, scores if templates is None else scores @ templates.T


def test_the_layer_twice_in_one_graph_and_two_backward_passes(path):
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    layer = layer_of()
    once = Enhance(layer)
    first, second = once(x), once(x.square())
    total = sum((f.square().sum() + s.square().sum()) for f, s in (first, second))
    grads = torch.autograd.grad(total, [x, *layer.parameters()], retain_graph=True)
    again = torch.autograd.grad(total, [x, *layer.parameters()])
    layer.fuses = lambda *_: False
    first, second = once(x), once(x.square())
    total = sum((f.square().sum() + s.square().sum()) for f, s in (first, second))
    for a, b, c in zip(
        grads, again, torch.autograd.grad(total, [x, *layer.parameters()]), strict=True
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_values_and_gradients_stay_near_float32(path, dtype):
    layer = layer_of(32, 64, torch.float32)
    layer.norm.weight.data.fill_(0.2)
    layer.norm.bias.data.copy_(torch.where(torch.arange(64) % 3 == 0, -1.0, 1.0))
    x = torch.randn(8, 32, 4, 4)
    seeds = torch.randn_like(x), torch.randn(8, 4, 4, 64)
    exact = step(copy.deepcopy(layer), x, seeds)
    with torch.autocast("cpu", dtype=dtype):
        low = step(layer, x, seeds)
    assert low[0].dtype == torch.float32
    assert low[1].dtype == dtype
    torch.testing.assert_close(low[0], exact[0], rtol=0, atol=0.05)
    for ours, theirs in zip(low[2], exact[2], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() <= 0.03 * theirs.norm() + 0.05


def saved_sizes(function):
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    return result, sizes


def largest_allocation(function):
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_low_memory_makes_no_tensor_of_all_positions_and_templates(monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 2**12)
    n, k = 2 * 24 * 24, 512
    targets = CodebookTargets(k).fit([(torch.randn(4096, 16), None)])
    layer, loss = KDLayer(8, k, memory="low"), TemplateLoss(template_targets=targets)
    x, teacher = torch.randn(2, 8, 24, 24, requires_grad=True), torch.randn(2, 24, 24, 16)

    def run():
        features, units, templates = layer.enhance(x)
        value = loss(units.movedim(1, -1), teacher, templates=templates)
        (features.sum() + value).backward()

    _, sizes = saved_sizes(run)
    assert max(sizes) < n * k / 10
    assert largest_allocation(run) < 4 * n * k / 10


def test_a_second_derivative_is_an_error():
    layer = layer_of()
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="recognise_backward"):
        grad.sum().backward()
    scores = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
    codebook, _, features, _ = assignments(torch.float64)
    value = codebook.divergence(scores, features[:9])
    (grad,) = torch.autograd.grad(value, scores, create_graph=True)
    with pytest.raises(RuntimeError, match="scale_gradient"):
        grad.sum().backward()


@pytest.mark.parametrize("keep", [True, False])
def test_operators_pass_opcheck(keep):
    def leaf(*shape):
        return torch.randn(*shape, requires_grad=True)

    inputs = (leaf(6, 3), leaf(4, 3), leaf(4), leaf(4), leaf(3, 4), 1e-5, keep)
    torch.library.opcheck(recognise, inputs)
    student, templates = (leaf(6, 4), None) if keep else (leaf(6, 3), leaf(4, 3))
    features, centers = torch.randn(6, 5), torch.randn(4, 5)
    torch.library.opcheck(codebook_divergence, (student, templates, features, centers, 0.5, True))
    own, table = torch.tensor([0, 1, 2, 3, 0, 1]), torch.rand(4, 4).softmax(1)
    torch.library.opcheck(decision_divergence, (student, templates, own, table, None, True))


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "norm", nn.SyncBatchNorm(7)),
        lambda layer: layer.norm.register_forward_hook(lambda *_: None),
        lambda layer: layer.norm.eval(),
        lambda layer: layer.eval(),
        lambda layer: setattr(layer.norm, "momentum", None),
    ],
)
def test_a_changed_batch_norm_takes_the_plain_path(change):
    layer = layer_of(dtype=torch.float32)
    assert layer.fuses(torch.device("cpu"), 8)
    change(layer)
    assert not layer.fuses(torch.device("cpu"), 8)
    if not isinstance(layer.norm, nn.SyncBatchNorm):
        assert layer.enhance(torch.randn(2, 5, 2, 2))[2] is None


def test_one_position_is_refused_as_batch_norm_does():
    with pytest.raises(ValueError, match="one image with one position"):
        KDLayer(5, 7)(torch.randn(1, 5, 1, 1))


def test_without_gradients_a_training_forward_is_the_same():
    layer = layer_of()
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        quiet = layer(x)
    assert torch.equal(quiet, other(x).detach())
    assert torch.equal(layer.norm.running_var, other.norm.running_var)
    codebook, _, features, _ = assignments(torch.float64)
    scores = torch.randn(9, 12, dtype=torch.float64)
    assert not codebook.divergence(scores, features[:9]).requires_grad


def losses_and_grads(memory, *, stride=1, frozen=False, compiled=False, targets=None):
    """One step of letKD-2 with a student of half or the same grid as the teacher's."""
    torch.manual_seed(0)
    student, teacher = Net(stride=stride), Net(channels=6, stride=2)
    images, labels = torch.randn(6, 3, 24, 24), torch.arange(6) % 3
    points = [
        KDPoint("first", targets=DecisionTargets(2, components=2)),
        KDPoint("last", targets=targets or CodebookTargets(9)),
    ]
    kd = attach_kd(student, teacher, points, memory=memory)
    kd.fit([(images, labels)], progress=False)
    if frozen:
        student.stem.requires_grad_(False)
        student.first[1].requires_grad_(False)
    run = torch.compile(student, backend="aot_eager", fullgraph=True) if compiled else student
    loss = F.cross_entropy(run(images), labels) + kd.loss(labels)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_of_a_whole_model_is_the_same_on_every_path(stride, memory, compiled, monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 100)
    with monkeypatch.context() as patch:
        use("plain", patch)
        plain_loss, plain = losses_and_grads("normal", stride=stride)
    use("kept", monkeypatch)
    loss, grads = losses_and_grads(memory, stride=stride, compiled=compiled)
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert grads.keys() == plain.keys()
    for name, grad in grads.items():
        assert (grad - plain[name]).norm() <= 1e-4 * plain[name].norm() + 1e-6, name


def test_templates_learn_below_frozen_modules():
    _, grads = losses_and_grads("low", frozen=True)
    assert grads["first.2.kd.head.weight"].abs().sum() > 0


def test_the_summary_says_which_path_is_taken():
    student = Net()
    kd = attach_kd(student, Net(), [KDPoint("last", targets=CodebookTargets(4))])
    assert "fused from 0 positions per batch, scores recomputed" in kd.summary()
    assert "training: plain torch operations, or fused operators, which are faster" in kd.summary()
    student.last[1].kd.norm = nn.SyncBatchNorm(4)
    assert "plain (SyncBatchNorm)" in kd.summary()


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_inference_in_chunks_equals_the_plain_operations(channel_dim, monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 40)
    layer = layer_of(channel_dim=channel_dim)
    shape = (2, 5, 3, 4) if channel_dim == 1 else (2, 9, 5)
    for _ in range(3):
        layer(torch.randn(shape, dtype=torch.float64))
    layer.eval()
    x = torch.randn(shape, dtype=torch.float64)
    x[0] = 0.0
    plain = layer(x)  # with gradients the plain operations run
    scores = layer.enhance(x)[1]
    with torch.no_grad():
        found, units, templates = layer.enhance(x)
        torch.testing.assert_close(found, plain.detach(), rtol=0, atol=1e-12)
        matched = (units.movedim(channel_dim, -1) @ templates.T).movedim(-1, channel_dim)
        torch.testing.assert_close(matched, scores.detach(), rtol=0, atol=1e-12)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (layer(x.float()) - plain).abs().max() < 0.1


def test_inference_makes_no_tensor_of_all_positions_and_templates(monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 2**12)
    student = Net(channels=8)
    kd = attach_kd(student, at=[KDPoint("stem", num_templates=512)])
    kd.detach()
    student.eval()
    images = torch.randn(2, 3, 24, 24)
    for model in (student, fold(student)):
        with torch.no_grad():
            most = largest_allocation(lambda model=model: model(images))
        assert most < 4 * 2 * 24 * 24 * 512 / 10


@pytest.mark.parametrize(
    ("channels", "templates", "positions", "memory", "fused"),
    [
        (8, 64, 2**13, "normal", True),
        (8, 64, 2**12, "normal", False),
        (32, 64, 2**13, "normal", False),
        (8, 64, 2**6, "low", True),
    ],
)
def test_small_layers_take_the_plain_operations(
    channels, templates, positions, memory, fused, monkeypatch
):
    monkeypatch.setattr(chunks, "LEAST_SCORES", 2**19)
    monkeypatch.setattr(chunks, "LEAST_RATIO", 4)
    student = nn.Sequential(nn.Conv2d(3, channels, 1), nn.ReLU())
    kd = attach_kd(student, at=[KDPoint("0", num_templates=templates)], memory=memory)
    layer = student[0].kd.train()
    assert layer.fuses(torch.device("cpu"), positions) == fused
    found = layer.enhance(torch.randn(1, channels, positions // 8, 8))[2]
    assert (found is not None) == fused
    row = next(line for line in kd.summary().splitlines() if line.startswith("0 "))
    ratio = "plain (under 4 templates per channel)"
    wanted = {(32, "normal"): ratio, (8, "low"): "fused, scores recomputed"}
    assert wanted.get((channels, memory), "fused from 8192 positions per batch") in row
