import pytest
import torch
from torch.nn import functional as F

from kdlayers.errors import ArgumentError, FitError, NotFittedError, ShapeError
from kdlayers.losses import InheritExploreLoss

from . import naive
from .loss_tester import LossTester


def coder(state, prefix, maps, training):
    """A reference coder built from its state: three times conv, batch norm, leaky ReLU."""
    maps = F.leaky_relu(maps, 0.1)
    for layer in (1, 4, 7):
        conv, norm = f"{prefix}.{layer}", f"{prefix}.{layer + 1}"
        maps = F.conv2d(maps, state[f"{conv}.weight"], padding=1)
        dims = (0, 2, 3)
        mean, var = state[f"{norm}.running_mean"], state[f"{norm}.running_var"]
        if training:
            mean, var = maps.mean(dims), maps.var(dims, unbiased=False)
        maps = (maps - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt()
        scale, shift = state[f"{norm}.weight"], state[f"{norm}.bias"]
        maps = F.leaky_relu(maps * scale[:, None, None] + shift[:, None, None], 0.1)
    return maps


def factors(loss, student, teacher):
    state = loss.state_dict()
    inherits = student[:, state["inherit_channels"].tolist()]
    explores = student[:, state["explore_channels"].tolist()]
    made = (
        coder(state, "inherit_encoder", inherits, loss.training),
        coder(state, "explore_encoder", explores, loss.training),
        coder(state, "auto_encoder.encoder", teacher, training=False),
    )
    return [factor.flatten(1).tolist() for factor in made]


class FactorTester(LossTester):
    kind = "maps"
    shift_invariant = False
    metrics = ("inheritance", "exploration")
    autocast_tolerance = 0.1  # convolutions of the encoders run in bfloat16 there

    def fresh(self, student, teacher):
        loss = super().fresh(student, teacher)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            loss.build(student, teacher)
        return loss.fit([(teacher, None)])


class TestInheritExplore(FactorTester):
    make = staticmethod(lambda: InheritExploreLoss(epochs=2, inherit_weight=20.0))

    @staticmethod
    def reference(loss, student, teacher, targets):
        inherits, explores, theirs = factors(loss, student, teacher)
        near = naive.distance(inherits, theirs, 1)
        return 20 * near - 50 * naive.distance(explores, theirs, 1)


class TestInheritExploreSquared(FactorTester):
    make = staticmethod(
        lambda: InheritExploreLoss(
            factor_channels=4,
            epochs=1,
            p=2,
            scale="sqrt_dim",
            split="random",
            inherit_weight=2.0,
            explore_weight=1.0,
            reconstruction="l2",
        )
    )

    @staticmethod
    def reference(loss, student, teacher, targets):
        inherits, explores, theirs = factors(loss, student, teacher)
        size = len(theirs[0]) ** 0.5
        return size * (
            2 * naive.distance(inherits, theirs, 2) - naive.distance(explores, theirs, 2)
        )


class TestInheritExploreCosine(FactorTester):
    make = staticmethod(
        lambda: InheritExploreLoss(
            epochs=1, measure="cosine", inherit_ratio=0.25, inherit_weight=2.0, explore_weight=1.0
        )
    )

    def inputs(self, batch=4, classes=5, *args, **kwargs):
        return super().inputs(batch, max(classes, 4), *args, **kwargs)

    @staticmethod
    def reference(loss, student, teacher, targets):
        inherits, explores, theirs = factors(loss, student, teacher)
        near = naive.mean(1 - c for c in naive.cosines(inherits, theirs))
        return 2 * near + naive.mean(abs(c) for c in naive.cosines(explores, theirs))


class TestAttentionHost(LossTester):
    make = staticmethod(lambda: InheritExploreLoss(host="attention", inherit_weight=20.0))
    kind = "maps"
    shift_invariant = False
    metrics = ("inheritance", "exploration")

    @staticmethod
    def reference(loss, student, teacher, targets):
        half = student.shape[1] // 2
        inherits, explores = naive.energy(student[:, :half]), naive.energy(student[:, half:])
        theirs = naive.energy(teacher)
        near = naive.distance(inherits, theirs, 1)
        return 20 * near - 50 * naive.distance(explores, theirs, 1)


def maps(channels, batch=4, size=4, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, size, size, generator=draw).relu()


def fitted(**options):
    loss = InheritExploreLoss(epochs=1, **options)
    loss.build(maps(6), maps(8))
    return loss.fit([(maps(8), None)])


def test_only_the_students_encoders_are_to_be_trained():
    loss = fitted()
    names = {name.split(".")[0] for name, _ in loss.named_parameters()}
    assert names == {"inherit_encoder", "explore_encoder"}
    assert all(p.requires_grad for p in loss.parameters())


def test_the_teachers_encoder_stays_in_eval_mode_and_unchanged():
    loss = fitted()
    before = {k: v.clone() for k, v in loss.auto_encoder.state_dict().items()}
    for mode in (True, False, True):
        loss.train(mode)
        loss(maps(6), maps(8, seed=1))
        assert not any(part.training for part in loss.auto_encoder.modules())
        assert loss.inherit_encoder.training == mode
    assert all(torch.equal(v, before[k]) for k, v in loss.auto_encoder.state_dict().items())


def test_the_split_takes_each_channel_once_and_is_saved():
    loss = fitted(split="random", seed=3)
    both = torch.cat([loss.inherit_channels, loss.explore_channels])
    assert sorted(both.tolist()) == list(range(6))
    other = InheritExploreLoss(split="random", seed=4)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.inherit_channels, loss.inherit_channels)
    assert other.fitted
    natural = fitted(inherit_ratio=0.34)
    assert natural.inherit_channels.tolist() == [0, 1]
    assert natural.explore_channels.tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("percent", range(1, 100))
def test_the_share_of_the_channels_is_exact(percent):
    loss = InheritExploreLoss(host="attention", inherit_ratio=percent / 100)
    loss(maps(100), maps(8))
    assert len(loss.inherit_channels) == percent  # 0.29 * 100 is below 29 in floating point


def test_use_before_fit_is_an_error():
    loss = InheritExploreLoss()
    assert not loss.fitted
    with pytest.raises(NotFittedError, match=r"call kd.fit\(loader\) before training; without"):
        loss(maps(6), maps(8))
    unfitted = InheritExploreLoss()
    unfitted.load_state_dict(loss.state_dict())
    assert not unfitted.fitted


def test_the_attention_host_needs_no_fit_and_has_no_parameters():
    loss = InheritExploreLoss(host="attention")
    assert loss.fitted
    assert loss.fitter() is None
    loss(maps(6), maps(8))
    assert not list(loss.parameters())
    with pytest.raises(ShapeError, match=r"2 positions on one grid, got .* InheritExplore"):
        loss(maps(6, size=1), maps(8))


def test_maps_of_different_size_are_pooled_to_the_smaller_grid():
    loss = fitted().eval()
    small = F.avg_pool2d(maps(8, size=8), 2)
    assert torch.equal(loss(maps(6), maps(8, size=8)), loss(maps(6), small))
    small = F.avg_pool2d(maps(6, size=8), 2)
    assert torch.equal(loss(maps(6, size=8), maps(8)), loss(small, maps(8)))


def test_equal_factors_have_a_finite_gradient_with_p_2():
    loss = fitted(p=2, host="attention")
    student = maps(2).repeat(1, 3, 1, 1).requires_grad_()
    loss(student, maps(2).repeat(1, 4, 1, 1)).backward()
    assert student.grad.isfinite().all()


def test_fit_gives_the_same_result_for_the_same_seed_and_no_global_randomness():
    before = torch.random.get_rng_state()
    first, second, third = (InheritExploreLoss(factor_channels=3, epochs=2) for _ in range(3))
    batches = [(maps(8, seed=s), None) for s in range(3)]
    first.fit(batches, seed=5)
    torch.rand(3)
    second.fit(batches, seed=5)
    third.fit(batches, seed=6)
    torch.random.set_rng_state(before)
    first.fit(batches, seed=5)
    assert torch.equal(torch.random.get_rng_state(), before)
    states = [loss.auto_encoder.state_dict() for loss in (first, second, third)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not torch.equal(states[0]["encoder.1.weight"], states[2]["encoder.1.weight"])


def test_the_stage_shows_pass_and_reconstruction_loss():
    fitter = InheritExploreLoss(factor_channels=3, epochs=2).fitter()
    assert fitter.stage == "auto-encoder 1/2"
    fitter.update(maps(8), None)
    assert fitter.end_pass()
    assert fitter.stage.startswith("auto-encoder 2/2, reconstruction loss 0.")
    with torch.no_grad():
        fitter.update(maps(8), None)
    assert not fitter.end_pass()


def test_unusable_data_is_an_error():
    with pytest.raises(FitError, match="is nan: the teacher's features have NaN or infinity"):
        InheritExploreLoss(factor_channels=3).fit([(maps(8) * float("nan"), None)])
    with pytest.raises(FitError, match="every batch had one image with a 1x1 map"):
        InheritExploreLoss(factor_channels=3).fit([(maps(8, batch=1, size=1), None)])
    with pytest.raises(FitError, match="empty loader"):
        InheritExploreLoss(factor_channels=3).fit([])
    with pytest.raises(ArgumentError, match="give factor_channels=, or call build"):
        InheritExploreLoss().fit([(maps(8), None)])
    with pytest.raises(ShapeError, match="have 7 channels, but the auto-encoder is for 8"):
        fitted().fit([(maps(7), None)])


def test_a_leftover_image_with_a_1x1_map_does_not_stop_the_fit():
    loss = InheritExploreLoss(factor_channels=3, epochs=1)
    assert loss.fit([(maps(8, size=1), None), (maps(8, batch=1, size=1), None)]).fitted


def test_shapes_that_do_not_fit_are_named():
    loss = fitted()
    with pytest.raises(ShapeError, match=r"made for 6 student and 8 teacher channels, got \[4, 5"):
        loss(maps(5), maps(8))
    with pytest.raises(ShapeError, match="one image with a 1x1 map has no batch statistics"):
        loss(maps(6, batch=1, size=1), maps(8, batch=1))
    with pytest.raises(ShapeError, match="leaves 0 to inherit and 1 to explore"):
        InheritExploreLoss().build(maps(1), maps(8))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"split": "half"}, "split must be one of natural, random, got 'half'"),
        ({"host": "logits"}, "host must be one of factor, attention"),
        ({"measure": "rbf"}, "measure must be one of norm, cosine, cka, got .rbf."),
        ({"p": 3}, "p must be 1 or 2, got 3"),
        ({"measure": "cosine", "scale": "sqrt_dim"}, "p and scale apply to measure="),
        ({"reconstruction": "l3"}, "reconstruction must be one of l1, l2"),
        ({"explore_weight": -1.0}, "explore_weight must be 0 or more"),
        ({"inherit_ratio": 1.0}, "inherit_ratio must be below 1, so that channels are left"),
        ({"factor_channels": 0}, "factor_channels must be 1 or more"),
        ({"epochs": 0}, "epochs must be 1 or more"),
        ({"fit_lr": 0.0}, "fit_lr must be above 0"),
    ],
)
def test_unusable_options_are_named(wrong, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        InheritExploreLoss(**wrong)


def test_alignment_of_kernels_as_measure():
    loss = fitted(measure="cka", inherit_weight=1.0, explore_weight=2.0)
    student = maps(6).requires_grad_()
    value = loss(student, maps(8))
    value.backward()
    terms = loss.metrics()
    assert all(0 <= term <= 1 for term in terms.values())
    torch.testing.assert_close(value.detach(), terms["inheritance"] + 2 * terms["exploration"])
    assert student.grad.abs().sum() > 0
    with pytest.raises(ShapeError, match="needs a batch of 3 or more, got 2"):
        loss(maps(6, batch=2), maps(8, batch=2))
