"""Values and gradients equal those of torchdistill, where it has the same loss."""

import pytest
import torch
import torch.nn.functional as F

from kdlayers import functional as kdf

mid_level = pytest.importorskip("torchdistill.losses.mid_level")
LOGITS = ("out", "output", "out", "output")


def theirs(loss):
    def call(student, teacher):
        return loss({"out": {"output": student}}, {"out": {"output": teacher}}, None)

    return call


def standardized(student, teacher):
    return kdf.kd(kdf.standardize(student), kdf.standardize(teacher), temperature=2.0)


PAIRS = {
    "kd": (
        lambda s, t: kdf.kd(s, t),
        # Without labels it leaves the squared temperature out.
        lambda: lambda s, t: 16 * theirs(mid_level.KDLoss(*LOGITS, 4.0, alpha=0.0))(s, t),
    ),
    "standardised kd": (
        standardized,
        lambda: lambda s, t: 4 * theirs(mid_level.LogitStdKDLoss(*LOGITS, 2.0, alpha=0.0))(s, t),
    ),
    "dist": (
        lambda s, t: kdf.dist(s, t, beta=2.0, gamma=0.5, temperature=4.0),
        lambda: theirs(mid_level.DISTLoss(*LOGITS, beta=2.0, gamma=0.5, tau=4.0)),
    ),
    "rkd_distance": (
        kdf.rkd_distance,
        lambda: theirs(mid_level.RKDLoss("out", "out", 1.0, 0.0, "mean")),
    ),
    "rkd_angle": (kdf.rkd_angle, lambda: theirs(mid_level.RKDLoss("out", "out", 0.0, 1.0, "mean"))),
    "similarity_preserving": (kdf.similarity_preserving, lambda: rows_of_unit_length),
}


def rows_of_unit_length(student, teacher):
    """Its loss with the paper's norm: its call normalize(x, 1) takes the 1 for the norm's order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mid_level, "normalize", lambda products, _axis: F.normalize(products, dim=1))
        return theirs(mid_level.SPKDLoss("out", "out", "batchmean"))(student, teacher)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("ours", "make"), PAIRS.values(), ids=PAIRS)
def test_values_and_gradients_are_the_same(ours, make, seed):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(8, 12, generator=draw, dtype=torch.float64) for _ in "ab")
    found = []
    for call in (ours, make()):
        student = student.detach().requires_grad_()
        value = call(student, teacher)
        found.append((value.detach(), torch.autograd.grad(value, student)[0]))
    (value, slope), (their_value, their_slope) = found
    assert value > 1e-3
    # In DIST it bounds each norm, where the authors' code adds a constant to their product.
    torch.testing.assert_close(value, their_value, rtol=0, atol=1e-5)
    torch.testing.assert_close(slope, their_slope, rtol=0, atol=1e-5)
