import pytest
import torch

from kdlayers.errors import ArgumentError, ShapeError
from kdlayers.losses import ChannelWiseLoss, DISTLoss, RKDLoss, SimilarityPreservingLoss

from . import naive, naive_relations
from .loss_tester import LossTester


class Batches(LossTester):
    """Relations need a batch: of 2 samples, or 3."""

    least = 2

    def inputs(self, batch=4, *args, **kwargs):
        return super().inputs(max(batch, self.least), *args, **kwargs)


class TestDIST(Batches):
    make = DISTLoss
    reference = staticmethod(lambda loss, s, t, _: naive_relations.dist(s, t))


class TestDISTWithOtherNumbers(Batches):
    make = staticmethod(lambda: DISTLoss(beta=2.0, gamma=0.5, temperature=4.0))
    reference = staticmethod(lambda loss, s, t, _: naive_relations.dist(s, t, 2.0, 0.5, 4.0))


class TestRKD(Batches):
    make = RKDLoss
    reference = staticmethod(
        lambda loss, s, t, _: (
            25 * naive_relations.rkd_distance(s, t) + 50 * naive_relations.rkd_angle(s, t)
        )
    )
    kind = "maps"
    least = 3


class TestRKDOfDistancesOfVectors(Batches):
    make = staticmethod(lambda: RKDLoss(distance=1.0, angle=0.0))
    reference = staticmethod(lambda loss, s, t, _: naive_relations.rkd_distance(s, t))
    shift_invariant = True
    least = 3


class TestRKDOfAngles(Batches):
    make = staticmethod(lambda: RKDLoss(distance=0.0, angle=2.0))
    reference = staticmethod(lambda loss, s, t, _: 2 * naive_relations.rkd_angle(s, t))
    least = 3


class TestSimilarityPreserving(Batches):
    make = SimilarityPreservingLoss
    reference = staticmethod(lambda loss, s, t, _: naive_relations.similarity_preserving(s, t))
    kind = "maps"
    shift_invariant = False


class TestChannelWise(LossTester):
    make = ChannelWiseLoss
    reference = staticmethod(lambda loss, s, t, _: naive_relations.channelwise(s, t))
    kind = "maps"


def projected(loss, student, teacher, _targets):
    """The convolution by loops, and then the divergence."""
    weight = loss.projector.weight[:, :, 0, 0].tolist()
    positions = student.movedim(1, -1)
    values = [
        [sum(w * f for w, f in zip(line, position, strict=True)) for line in weight]
        for position in positions.flatten(0, 2).tolist()
    ]
    mapped = torch.tensor(values, dtype=torch.float64).view(*positions.shape[:-1], -1)
    return naive_relations.channelwise(mapped.movedim(-1, 1), teacher, 1.0)


class TestChannelWiseWithOtherChannels(LossTester):
    make = staticmethod(lambda: ChannelWiseLoss(temperature=1.0))
    reference = staticmethod(projected)
    kind = "maps"

    def inputs(self, *args, **kwargs):
        student, teacher, targets = super().inputs(*args, **kwargs)
        return student, torch.cat([teacher, teacher.flip(1)[:, :2]], 1), targets


def test_widths_may_differ_where_relations_are_compared():
    student, teacher = torch.randn(4, 3, 2, 2), torch.randn(4, 7)
    for loss in (RKDLoss(), SimilarityPreservingLoss()):
        assert loss(student, teacher) > 0
    assert SimilarityPreservingLoss().weight_at(0) == 3000.0


@pytest.mark.parametrize(
    ("loss", "least"),
    [(DISTLoss(), 2), (RKDLoss(), 3), (SimilarityPreservingLoss(), 2)],
    ids=lambda value: type(value).__name__,
)
def test_too_few_samples_are_an_error_instead_of_zero(loss, least):
    few = torch.randn(least - 1, 5)
    with pytest.raises(ShapeError, match=f"a batch of {least} or more, got .* drop_last=True"):
        loss(few, few)


def test_the_larger_grid_is_average_pooled():
    loss = ChannelWiseLoss()
    student, teacher = torch.rand(2, 3, 4, 2), torch.rand(2, 3, 2, 4)
    small = student.reshape(2, 3, 2, 2, 2).mean(3), teacher.reshape(2, 3, 2, 2, 2).mean(4)
    torch.testing.assert_close(loss(student, teacher), loss(*small))


def test_a_channelwise_loss_cannot_be_used_at_two_points():
    loss = ChannelWiseLoss()
    loss(torch.rand(2, 3, 2, 2), torch.rand(2, 5, 2, 2))
    with pytest.raises(ShapeError, match=r"maps 3 to 5 channels, got \[2, 4, 2, 2\] and"):
        loss(torch.rand(2, 4, 2, 2), torch.rand(2, 5, 2, 2))


def test_channels_without_positions_are_refused():
    with pytest.raises(ShapeError, match=r"at least 2 positions on one grid, got .* RKDLoss"):
        ChannelWiseLoss()(torch.rand(2, 3, 1, 1), torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    ("make", "wrong", "sentence"),
    [
        (DISTLoss, {"beta": -1.0}, "beta must be 0 or more"),
        (DISTLoss, {"temperature": 0.0}, "temperature must be above 0"),
        (RKDLoss, {"angle": -1.0}, "angle must be 0 or more"),
        (RKDLoss, {"distance": 0.0, "angle": 0.0}, "both 0: RKDLoss would compare nothing"),
        (ChannelWiseLoss, {"temperature": -4.0}, "temperature must be above 0"),
    ],
)
def test_numbers_out_of_range_are_named(make, wrong, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        make(**wrong)


def test_printed_losses_show_their_numbers():
    assert repr(RKDLoss(at="a")) == "RKDLoss(distance=25.0, angle=50.0, weight=1.0, at='a')"
    assert repr(DISTLoss()).startswith("DISTLoss(beta=1.0, gamma=1.0, temperature=1.0, weight=1.0")
    assert "temperature=4.0, weight=5, at=None" in repr(ChannelWiseLoss(weight=5))


def test_naive_helpers_agree_with_each_other():
    """Two loops, one number: a channel of two positions is a class pair of one sample."""
    student, teacher = torch.randn(5, 2), torch.randn(5, 2)
    expected = naive.kd(student, teacher, torch.zeros(5).long())
    maps = (logits[None, :, None, :] for logits in (student, teacher))
    assert naive_relations.channelwise(*maps) == pytest.approx(expected)
