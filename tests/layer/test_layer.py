import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlayers import KDLayer, TemplateHead
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from tests import reference


def enhance(layer, x):
    """Features and scores, whether the layer kept the scores or gives their factors."""
    features, found, templates = layer.enhance(x)
    if templates is not None:
        dim = layer.head.channel_dim
        found = (found.movedim(dim, -1) @ templates.T).movedim(-1, dim)
    return features, found


def double_layer(channels=5, templates=7, alpha=0.7):
    layer = KDLayer(channels, templates, alpha=alpha).double()
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
        layer.norm.bias.normal_()
        layer.value.scale.fill_(1.3)
    return layer


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_single_position_cannot_train(memory):
    layer, one = KDLayer(5, 7, memory=memory), torch.randn(1, 5, 1, 1)
    with pytest.raises(ShapeError, match="one image with one position; give two images or more"):
        layer(one)
    layer.norm.eval()
    assert layer(one).shape == one.shape
    assert layer.train()(one.expand(2, 5, 1, 1)).shape == (2, 5, 1, 1)


def test_values_and_every_gradient_equal_the_written_out_layer():
    layer = double_layer()
    x = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    features, scores = enhance(layer, x)
    parameters = dict(layer.named_parameters())
    seeds = torch.randn_like(features), torch.randn_like(scores)
    ours = torch.autograd.grad(
        (features * seeds[0]).sum() + (scores * seeds[1]).sum(), [x, *parameters.values()]
    )
    plain_features, plain_scores = reference.kd_layer(x, parameters, 0.7)
    theirs = torch.autograd.grad(
        (plain_features * seeds[0]).sum() + (plain_scores * seeds[1]).sum(),
        [x, *parameters.values()],
    )
    torch.testing.assert_close(features, plain_features, rtol=0, atol=1e-12)
    torch.testing.assert_close(scores, plain_scores, rtol=0, atol=1e-12)
    for mine, plain in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-9)


def test_gradcheck():
    layer = double_layer().eval()
    x = torch.randn(2, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: enhance(layer, x), (x,))


def test_initial_values():
    torch.manual_seed(1)
    layer = KDLayer(64, 4096)
    assert layer.head.weight.shape == (4096, 64)
    assert layer.value.weight.shape == (64, 4096)
    assert layer.head.scale.item() == 3.0
    assert layer.value.scale.item() == 1.0
    assert layer.head.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.01)
    assert layer.value.weight.std().item() == pytest.approx((2 / 4096) ** 0.5, rel=0.01)
    assert sum(p.numel() for p in layer.parameters()) == 532_482  # published for C=64, K=4096
    assert sum(p.numel() for p in KDLayer(64, 800).parameters()) == 104_002


def test_axes_that_are_normalised():
    layer = double_layer()
    x = torch.randn(3, 5, 2, 2, dtype=torch.float64)
    _, scores = enhance(layer, x)
    _, other = enhance(layer, x * torch.rand(3, 1, 2, 2, dtype=torch.float64) * 9)
    torch.testing.assert_close(scores, other)
    assert scores.abs().max() <= layer.head.scale
    with torch.no_grad():
        layer.value.weight *= torch.rand(5, 1, dtype=torch.float64) + 0.1
    before = layer(x)
    with torch.no_grad():
        layer.value.weight *= torch.rand(5, 1, dtype=torch.float64) + 0.1
    torch.testing.assert_close(layer(x), before)


def test_value_path_ignores_the_template_scale_and_a_common_factor_of_the_norm():
    layer = double_layer()
    layer.norm.eps = 1e-14
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    before = layer(x)
    with torch.no_grad():
        layer.head.scale *= 4
        layer.norm.weight *= 2.5
        layer.norm.bias *= 2.5
    torch.testing.assert_close(layer(x), before)


def test_positions_without_a_match_pass_unchanged():
    layer = KDLayer(5, 7).eval()
    with torch.no_grad():
        layer.norm.bias.fill_(-100.0)
    x = torch.randn(2, 5, 3, 3)
    assert torch.equal(layer(x), x)


def test_zero_features_give_zero_scores_and_finite_gradients():
    layer = KDLayer(5, 7)
    x = torch.randn(2, 5, 3, 3)
    x[0, :, 1, 1] = 0
    x.requires_grad_()
    features, scores = enhance(layer, x)
    assert torch.equal(scores[0, :, 1, 1], torch.zeros(7))
    (features.sum() + scores.square().sum()).backward()
    assert torch.isfinite(x.grad).all()
    assert x.grad.abs().max() < 1e6


@given(
    batch=st.integers(1, 3),
    space=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    channels=st.integers(1, 6),
    templates=st.integers(1, 9),
    last=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_spatial_shape_and_either_channel_axis(batch, space, channels, templates, last):
    layer = KDLayer(channels, templates, channel_dim=-1 if last else 1).double().eval()
    x = torch.randn(batch, *space, channels, dtype=torch.float64)
    x = x if last else x.movedim(-1, 1)
    features, scores = enhance(layer, x)
    assert features.shape == x.shape
    rows = x.movedim(layer.head.channel_dim, -1).reshape(-1, channels)
    plain = reference.cosine(rows, layer.head.weight, layer.head.scale)
    torch.testing.assert_close(
        scores.movedim(layer.head.channel_dim, -1).reshape(-1, templates), plain
    )
    assert layer.head(x).shape == scores.shape


def test_layouts_agree():
    first = KDLayer(5, 7)
    last = KDLayer(5, 7, channel_dim=-1)
    last.load_state_dict(first.state_dict())
    x = torch.randn(2, 5, 3, 4)
    a, b = first(x), last(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(a, b)
    tokens = last.eval()(x.flatten(2).transpose(1, 2))
    torch.testing.assert_close(tokens.transpose(1, 2).unflatten(2, (3, 4)), first.eval()(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_in_float32_under_autocast_and_in_half_models(dtype):
    layer = KDLayer(64, 128)
    # float16 holds at most 65504: these vectors' sums of squares do not fit.
    x = torch.randn(2, 64, 3, 3) * 300
    exact = enhance(layer, x)
    with torch.autocast("cpu", dtype=dtype):
        features, scores = enhance(layer, x)
    assert features.dtype == x.dtype
    torch.testing.assert_close(scores.float(), exact[1], rtol=0, atol=0.05)
    half = copy.deepcopy(layer).to(dtype).eval()
    features, scores = enhance(half, x.to(dtype))
    assert features.dtype == scores.dtype == dtype
    assert torch.isfinite(features).all()
    torch.testing.assert_close(scores.float(), exact[1], rtol=0, atol=0.05)


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: KDLayer(8, 0), ArgumentError, "num_templates must be 1 or more, got 0"),
        (lambda: KDLayer(0, 8), ArgumentError, "in_channels must be 1 or more, got 0"),
        (lambda: KDLayer(8, 2.5), ArgumentTypeError, "num_templates must be an integer, got float"),
        (lambda: KDLayer(8, 8, alpha=-1), ArgumentError, "alpha must be 0 or more"),
        (lambda: KDLayer(8, 8, alpha="1"), ArgumentTypeError, "alpha must be a number, got str"),
        (lambda: TemplateHead(8, 8, scale=None), ArgumentTypeError, "scale must be a number"),
        (lambda: KDLayer(8, 8, channel_dim=0), ArgumentError, "channel_dim must not be 0"),
        (lambda: TemplateHead(8, 8, scale=-3.0), ArgumentError, "scale must be above 0 and finite"),
        (lambda: TemplateHead(8, 8, scale=0.0), ArgumentError, "scale must be above 0 and finite"),
        (
            lambda: KDLayer(8, 8)(torch.zeros(2, 6, 3, 3)),
            ShapeError,
            r"made for 8 channels on axis 1, but got a tensor of shape \(2, 6, 3, 3\)",
        ),
        (
            lambda: KDLayer(8, 8, channel_dim=3)(torch.zeros(2, 6, 8)),
            ShapeError,
            "give the axis of the channels",
        ),
    ],
)
def test_bad_arguments(make, error, sentence):
    with pytest.raises(error, match=sentence):
        make()


def test_is_an_ordinary_module():
    layer = KDLayer(4, 6)
    assert set(layer.state_dict()) == {
        "head.weight",
        "head.scale",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
        "value.weight",
        "value.scale",
    }
    x = torch.randn(2, 4, 3, 3)
    twin = copy.deepcopy(layer).eval()
    assert torch.equal(twin(x), layer.eval()(x))
    script = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(script(x), layer(x))
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(layer).norm, nn.SyncBatchNorm)
