"""Keys of kd.terms are unique."""

import pytest
import torch

from kdlayers import (
    AEKTLoss,
    AttentionTransferLoss,
    ChannelWiseLoss,
    DistillLoss,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    MutualLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    StudentFriendlyKDLoss,
    attach_kd,
    attach_mutual,
)
from kdlayers.errors import ArgumentError, ArgumentTypeError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(*losses, at=()):
    student = Net(4)
    return student, attach_kd(student, Net(6), at, losses=losses, example=IMAGES)


@pytest.mark.parametrize(
    ("losses", "sentence"),
    [
        ([KDLoss(name="total")], r"'total', but kd.terms\['total'\] is the sum of all terms"),
        (
            [KDLoss(name="a.weighted"), MutualLoss(name="a")],
            r"'a.weighted', but .* is the weighted value of 'a'; give it another name=",
        ),
        (
            [AEKTLoss(), KDLoss(name="AEKTLoss.ratio")],
            r"'AEKTLoss.ratio', but .* is the metric 'ratio' of 'AEKTLoss'",
        ),
        (
            [KDLoss(name="skd.target"), StudentFriendlyKDLoss(base=AEKTLoss(), name="skd")],
            "is the metric 'target' of 'skd'",
        ),
        (
            [
                InheritExploreLoss(factor_channels=2, at="last", host="attention"),
                KDLoss(name="InheritExploreLoss.last.exploration"),
            ],
            "is the metric 'exploration' of 'InheritExploreLoss.last'",
        ),
    ],
)
def test_duplicate_names_are_errors(losses, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        attached(*losses)


def test_similar_names_are_allowed():
    points = [KDPoint(name, num_templates=3) for name in ("last", "last.0")]
    _, kd = attached(FitNetLoss(at="last"), FitNetLoss(at="last.0"), KDLoss(name="FitNetLoss"))
    assert [term.name for term in kd._terms] == [
        "FitNetLoss.last",
        "FitNetLoss.last.0",
        "FitNetLoss",
    ]
    kd.remove()
    student = Net(4)
    attach_kd(student, None, points, example=IMAGES)


class Unannounced(DistillLoss):
    def forward(self, student, teacher, targets=None):
        value = (student - teacher).square().mean()
        self._record(size=value)
        return value


@pytest.mark.parametrize("names", [("mine", "mine.size"), ("mine.size", "mine")])
def test_an_undeclared_metric_that_collides_is_an_error(names):
    losses = {"mine": Unannounced(name="mine"), "mine.size": KDLoss(name="mine.size")}
    student, kd = attached(*(losses[name] for name in names))
    student(IMAGES)
    with pytest.raises(ArgumentError, match=r"two values have the key 'mine.size' in kd.terms"):
        kd.loss(LABELS)


@pytest.mark.parametrize(
    "loss",
    [
        KDLoss(),
        DKDLoss(),
        AEKTLoss(),
        MutualLoss(),
        StudentFriendlyKDLoss(),
        StudentFriendlyKDLoss(base=AEKTLoss()),
        FitNetLoss(at="last"),
        AttentionTransferLoss(at="last"),
        FeatureLoss(at="last", tokens="pooled"),
        DISTLoss(),
        RKDLoss(at="last"),
        SimilarityPreservingLoss(at="last"),
        ChannelWiseLoss(at="last"),
        InheritExploreLoss(factor_channels=2, at="last", coder="online"),
        InheritExploreLoss(factor_channels=2, at="last", host="attention"),
    ],
    ids=lambda loss: type(loss).__name__,
)
def test_losses_declare_their_metrics(loss):
    student, kd = attached(loss)
    student(IMAGES)
    kd.loss(LABELS)
    assert set(loss.metrics()) <= set(loss.metric_names)
    assert (len(loss.metric_names) > 0) == (len(loss.metrics()) > 0)


@pytest.mark.parametrize("kept", [{"coder": "online"}, {"host": "attention"}])
def test_mutual_learning_refuses_an_auto_encoder_that_is_fitted_beforehand(kept):
    a, b = Net(4), Net(6)
    losses = [MutualLoss(), InheritExploreLoss(factor_channels=2, at="last")]
    with pytest.raises(ArgumentError, match=r'changes all the time; pass coder="online"'):
        attach_mutual(a, b, losses=losses, example=IMAGES)
    assert not any(m._forward_hooks for net in (a, b) for m in net.modules())
    attach_mutual(
        a, b, losses=[InheritExploreLoss(factor_channels=2, at="last", **kept)], example=IMAGES
    )


def seen_by_fit(losses, at=(), seed=0):
    """First image number of every batch, pass by pass, and the handle."""
    student = Net(4)
    kd = attach_kd(student, Net(6), at, losses=losses, example=IMAGES)
    order = []

    class Numbered(torch.utils.data.Dataset):
        def __len__(self):
            return len(IMAGES)

        def __getitem__(self, index):
            order.append((index, torch.rand(()).item()))  # the draw stands for an augmentation
            return IMAGES[index], LABELS[index]

    kd.fit(torch.utils.data.DataLoader(Numbered(), batch_size=3, shuffle=True), seed=seed)
    size = len(IMAGES)
    return [tuple(order[i : i + size]) for i in range(0, len(order), size)], kd


def test_passes_of_statistics_see_equal_data():
    from kdlayers import CodebookTargets, DecisionTargets

    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    passes, _ = seen_by_fit([], points)
    assert len(passes) > 1
    assert len(set(passes)) == 1


def test_passes_of_an_auto_encoder_differ_and_are_reproducible():
    def loss():
        return InheritExploreLoss(factor_channels=2, at="last", epochs=5)

    def coder(kd):
        return kd.state_dict()["losses"]["InheritExploreLoss.last"]

    torch.manual_seed(1)
    passes, first = seen_by_fit([loss()])
    assert len(passes) == len(set(passes)) == 5
    torch.manual_seed(1)
    again, second = seen_by_fit([loss()])
    assert passes == again
    assert all(torch.equal(v, coder(second)[k]) for k, v in coder(first).items())
    other, _ = seen_by_fit([loss()], seed=9)
    assert not set(other) & set(passes)


def test_an_auto_encoder_shares_passes_with_a_codebook():
    from kdlayers import CodebookTargets

    point = KDPoint("last", targets=CodebookTargets(4))
    alone, _ = seen_by_fit([], [point])
    point = KDPoint("last", targets=CodebookTargets(4))
    passes, _ = seen_by_fit([InheritExploreLoss(factor_channels=2, at="last", epochs=6)], [point])
    shared = len(alone)
    assert passes[:shared] == alone
    assert len(set(passes)) == 1 + 6 - shared


class Returning(DistillLoss):
    """A loss of a user; what it returns is a function of the two tensors."""

    def __init__(self, value, **kwargs):
        super().__init__(**kwargs)
        self.value = value

    def forward(self, student, teacher, targets=None):
        return self.value(student, teacher)


UNUSABLE = [
    (lambda s, t: 0.5, r"of Returning returned a float; return a scalar tensor with a gradient"),
    (lambda s, t: None, "returned a NoneType"),
    (lambda s, t: (s - t).square(), r"returned a tensor of shape \[6, 3\]; .*\.mean\(\)"),
    (lambda s, t: (s.detach() - t).square().mean(), r"does not depend on the student, .*detach"),
]


@pytest.mark.parametrize("call", ["loss", "gradient_norms"])
@pytest.mark.parametrize(("value", "sentence"), UNUSABLE)
def test_a_loss_that_returns_no_scalar_with_gradient_is_an_error(value, sentence, call):
    student, kd = attached(Returning(value, name="mine"), KDLoss())
    student(IMAGES)
    with pytest.raises(ArgumentTypeError, match=f"^mine: .*{sentence}"):
        getattr(kd, call)(LABELS)
    assert kd.step == 0


def test_a_loss_may_be_constant_if_it_is_only_logged_or_for_some_batches():
    def distance(student, teacher):
        empty = kd.step == 1
        return student.new_zeros(()) if empty else (student - teacher).square().mean()

    student, kd = attached(
        Returning(lambda s, t: (s.detach() - t).abs().mean(), name="logged", weight=0.0),
        Returning(distance, name="learnt"),
    )
    for _ in range(2):
        student(IMAGES)
        kd.loss(LABELS)
    assert kd.terms["logged"] > 0
    assert kd.terms["total"] == kd.terms["learnt"] == 0


def test_a_schedule_that_starts_at_zero_hides_no_loss_without_gradient():
    student, kd = attached(
        Returning(lambda s, t: s.detach().mean(), weight=lambda step: float(step)), KDLoss()
    )
    student(IMAGES)
    kd.loss(LABELS)
    student(IMAGES)
    with pytest.raises(ArgumentTypeError, match="does not depend on the student"):
        kd.loss(LABELS)
