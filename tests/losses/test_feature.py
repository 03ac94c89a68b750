import pytest
import torch
from torch import nn

from kdlayers.errors import ArgumentError, ShapeError
from kdlayers.losses import FeatureLoss, FitNetLoss
from kdlayers.losses._teacher_norm import TeacherNorm

from . import naive
from .loss_tester import LossTester


def rows(features):
    """Lists of channels, position by position."""
    channels_last = features.movedim(1, -1) if features.dim() == 4 else features
    return channels_last.flatten(0, -2).tolist()


def linear(layer, lines):
    weight, bias = layer.weight.flatten(1).tolist(), layer.bias.tolist()
    return [
        [sum(w * f for w, f in zip(row, line, strict=True)) + b for row, b in both]
        for line in lines
        for both in [list(zip(weight, bias, strict=True))]
    ]


def cosine(ours, theirs):
    return 1 - naive.mean(naive.cosines(ours, theirs))


def squared(ours, theirs):
    return naive.mean(
        (a - b) ** 2 for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def huber(ours, theirs):
    def one(x):
        return x * x / 2 if abs(x) < 1 else abs(x) - 0.5

    return naive.mean(
        one(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)
    )


def mean_rows(maps):
    return [
        [naive.mean(values) for values in zip(*rows(sample[None]), strict=True)] for sample in maps
    ]


class Features(LossTester):
    kind = "maps"
    shift_invariant = False


class TestCosineOfMaps(Features):
    make = FeatureLoss
    reference = staticmethod(lambda loss, s, t, _: cosine(linear(loss.projector, rows(s)), rows(t)))


class TestSquaresWithoutAProjector(Features):
    make = staticmethod(lambda: FeatureLoss(distance="mse", projector=None))
    reference = staticmethod(lambda loss, s, t, _: squared(rows(s), rows(t)))


class TestHuberOfVectorsThroughAnMLP(Features):
    make = staticmethod(lambda: FeatureLoss(distance="smooth_l1", projector="mlp"))
    kind = "logits"

    @staticmethod
    def reference(loss, student, teacher, targets):
        first, _, last = loss.projector
        hidden = torch.tensor(linear(first, rows(student)), dtype=torch.float64)
        hidden = 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5))
        return huber(linear(last, hidden.tolist()), rows(teacher))


class TestPooledMaps(Features):
    make = staticmethod(lambda: FeatureLoss(tokens="pooled", projector=nn.Identity()))
    reference = staticmethod(lambda loss, s, t, _: cosine(mean_rows(s), mean_rows(t)))


class TestStandardisedTeacher(Features):
    make = staticmethod(lambda: FeatureLoss(distance="mse", normalize_teacher=True))

    @staticmethod
    def reference(loss, student, teacher, targets):
        columns = list(zip(*rows(teacher), strict=True))
        means = [naive.mean(c) for c in columns]
        spreads = [
            (naive.mean((v - m) ** 2 for v in c) + 1e-6) ** 0.5
            for c, m in zip(columns, means, strict=True)
        ]
        goal = [
            [(v - m) / s for v, m, s in zip(row, means, spreads, strict=True)]
            for row in rows(teacher)
        ]
        return squared(linear(loss.projector, rows(student)), goal)


def test_fitnet_is_a_special_case_with_the_numbers_it_had():
    torch.manual_seed(3)
    loss = FitNetLoss()
    student, teacher = torch.randn(2, 3, 4, 2, requires_grad=True), torch.randn(2, 5, 2, 4)
    value = loss(student, teacher)
    value.backward()
    # From the code before FeatureLoss was there.
    assert value.item() == pytest.approx(0.9044540524, abs=1e-7)
    expected = torch.tensor([0.00042904, 0.0174407, 0.00042904, 0.0174407])
    torch.testing.assert_close(student.grad.flatten()[:4], expected, rtol=0, atol=1e-7)
    assert list(loss.state_dict()) == ["regressor.weight", "regressor.bias"]
    same = FeatureLoss(distance="mse")
    same.load_state_dict(
        {k.replace("regressor", "projector"): v for k, v in loss.state_dict().items()}
    )
    assert torch.equal(same(student, teacher), value)


MAPS, TOKENS, VECTORS = (2, 6, 4, 2), (2, 8, 6), (2, 6)


@pytest.mark.parametrize("tokens", ["cls", "pooled"])
@pytest.mark.parametrize("teacher", [MAPS, TOKENS, VECTORS])
@pytest.mark.parametrize("student", [MAPS, TOKENS, VECTORS])
def test_one_vector_an_image_from_whatever_there_is(student, teacher, tokens):
    def vector(x):
        if x.dim() == 3:
            return x[:, 0] if tokens == "cls" else x.mean(1)
        return x if x.dim() == 2 else x.flatten(2).mean(2)

    ours, theirs = torch.randn(student), torch.randn(teacher)
    loss = FeatureLoss(tokens=tokens, distance="mse", projector=None)
    expected = (vector(ours) - vector(theirs)).square().mean()
    torch.testing.assert_close(loss(ours, theirs), expected)


def test_every_position_is_compared_where_both_have_the_same():
    ours, theirs = torch.randn(2, 8, 6), torch.randn(2, 8, 6)
    loss = FeatureLoss(projector=None)
    expected = 1 - nn.functional.cosine_similarity(ours, theirs, dim=2).mean()
    torch.testing.assert_close(loss(ours, theirs), expected)
    maps, vectors = torch.randn(MAPS), torch.randn(VECTORS)
    for pair in ((maps, vectors), (vectors, maps)):
        ours, theirs = (x.flatten(2).mean(2) if x.dim() == 4 else x for x in pair)
        expected = 1 - nn.functional.cosine_similarity(ours, theirs).mean()
        torch.testing.assert_close(loss(*pair), expected)


def test_zero_features_have_a_finite_gradient():
    student = torch.zeros(2, 6, requires_grad=True)
    FeatureLoss(projector=None)(student, torch.randn(2, 6)).backward()
    assert not student.grad.any()


def test_statistics_are_those_of_all_batches_and_are_saved():
    draw = torch.Generator().manual_seed(0)
    batches = [3 * torch.randn(5, 4, 3, 2, generator=draw) + 7 for _ in range(6)]
    loss = FeatureLoss(normalize_teacher=True)
    for batch in batches:
        loss(batch, batch)
    everything = torch.cat(batches).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(loss.teacher_norm.mean, everything.mean(0))
    torch.testing.assert_close(loss.teacher_norm.var, everything.var(0, correction=0))
    again = FeatureLoss(normalize_teacher=True)
    again.load_state_dict(loss.state_dict())
    assert again.teacher_norm.count == 6
    again.eval()(batches[0], batches[0])
    assert again.teacher_norm.count == 6  # not in eval mode
    goal = again.teacher_norm(everything, 1)
    torch.testing.assert_close(goal.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(goal.var(0, correction=0), torch.ones(4))


def test_a_channel_that_is_always_the_same_stays_finite():
    norm = TeacherNorm(2, torch.float32, torch.device("cpu"))
    assert not norm(torch.full((3, 2), 5.0), 1).any()


class Own(nn.Module):
    """With a layer whose statistics a dry run must not touch."""

    def __init__(self, width=6):
        super().__init__()
        self.norm, self.layer = nn.BatchNorm1d(3), nn.Linear(3, width)

    def forward(self, x):
        return self.layer(self.norm(x))


def test_a_module_of_ones_own_is_tried_without_a_trace():
    own = Own()
    loss = FeatureLoss(tokens="pooled", projector=own)
    loss.build(torch.zeros(2, 3, 4, 4), torch.zeros(2, 6, 2, 2))
    assert own.norm.num_batches_tracked == 0
    assert own.training
    loss(torch.randn(2, 3, 4, 4), torch.randn(2, 6, 2, 2)).backward()
    assert own.norm.num_batches_tracked == 1
    assert own.layer.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda: FeatureLoss(distance="l2"), ArgumentError, "distance must be one of cosine, mse"),
        (lambda: FeatureLoss(tokens="class"), ArgumentError, "tokens must be one of patch, cls"),
        (lambda: FeatureLoss(projector="conv"), ArgumentError, "None or a module, got .conv"),
        (lambda: FeatureLoss(projector="None"), ArgumentError, "got 'None'; None is the object"),
        (
            lambda: FeatureLoss(projector=None)(torch.rand(2, 3), torch.rand(2, 4)),
            ShapeError,
            r'must return the teacher\'s shape \[2, 4\].*pass projector="linear"',
        ),
        (
            lambda: FeatureLoss(tokens="pooled", projector=Own(5)).build(
                torch.rand(2, 3), torch.rand(2, 4)
            ),
            ShapeError,
            r"must return the teacher's shape \[2, 4\], but returned \[2, 5\] for \[2, 3\]",
        ),
        (
            lambda: FeatureLoss()(torch.rand(2, 9, 3), torch.rand(2, 4, 3)),
            ShapeError,
            r"attach_kd converts the tokens of points.* to maps.*; without it use tokens.tr",
        ),
        (lambda: FeatureLoss()(torch.rand(2), torch.rand(2, 4)), ShapeError, "must be maps .* got"),
    ],
)
def test_wrong_options_and_tensors_are_named(call, error, sentence):
    with pytest.raises(error, match=f"(?s){sentence}"):
        call()


def test_one_loss_belongs_to_one_point():
    loss = FeatureLoss(projector="mlp")
    loss(torch.rand(2, 3, 2, 2), torch.rand(2, 5, 2, 2))
    with pytest.raises(ShapeError, match=r"this FeatureLoss maps 3 to 5 channels, got \[2, 4, 2"):
        loss(torch.rand(2, 4, 2, 2), torch.rand(2, 5, 2, 2))


def test_a_projector_of_the_users_follows_a_float64_student():
    loss = FeatureLoss(projector=nn.Conv2d(4, 6, 1))
    loss.build(torch.zeros(2, 4, 5, 5, dtype=torch.float64), torch.zeros(2, 6, 5, 5))
    assert next(loss.parameters()).dtype == torch.float64
