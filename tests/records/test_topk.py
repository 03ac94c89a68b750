"""The largest logits and the rest's mass, against a loop over classes."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from kdlayers import (
    BinaryKDLoss,
    DKDLoss,
    FeatureLoss,
    KDLoss,
    StudentFriendlyKDLoss,
    attach_kd,
)
from kdlayers._records.topk import compress, expand
from kdlayers.errors import ArgumentError, RecordError
from tests.records.data import Squares


@pytest.mark.parametrize("k", [1, 5, 19])
def test_kept_logits_are_exact_and_the_others_share_the_rest(k):
    logits = torch.randn(6, 20, dtype=torch.float64) * 3
    found = expand(*compress(logits, k), 20)
    for row, back in zip(logits.tolist(), found.tolist(), strict=True):
        total = math.log(sum(math.exp(z) for z in row))
        order = sorted(range(20), key=lambda c: -row[c])
        rest = sum(math.exp(row[c] - total) for c in order[k:]) / (20 - k)
        for rank, c in enumerate(order):
            expected = row[c] if rank < k else math.log(rest) + total
            assert back[c] == pytest.approx(expected, abs=2e-5)
    torch.testing.assert_close(found.softmax(1).sum(1), torch.ones(6))


def test_equal_logits_keep_the_first_classes():
    values, kept = compress(torch.zeros(2, 7), 3)
    assert kept.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(expand(values, kept, 7), torch.zeros(2, 7), atol=1e-6, rtol=0)


class Mean(nn.Module):
    """Six logits of an image."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 6)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("loss", "why"),
    [
        (lambda: KDLoss(standardize=True), "KDLoss standardises"),
        (lambda: StudentFriendlyKDLoss(base=DKDLoss(standardize=True)), "KDLoss standardises"),
        (lambda: FeatureLoss(projector=None), "FeatureLoss does not compare probabilities"),
        (BinaryKDLoss, "BinaryKDLoss compares every class on its own"),
    ],
    ids=["KD", "student-friendly", "features", "binary"],
)
def test_losses_that_need_all_logits_are_refused(loss, why, tmp_path):
    data, student, teacher = Squares(8), Mean(), Mean()

    def attached(loss):
        return attach_kd(student, teacher, losses=[loss], example=torch.zeros(2, 3, 12, 12))

    kd = attached(KDLoss())
    recorded = kd.record(data, tmp_path / "record", views=1, topk=2, progress=False)
    kd.remove()
    kd = attached(loss())
    with pytest.raises(ArgumentError, match=f"topk=2 .*{why}.*; leave topk out"):
        kd.record(data, tmp_path / "refused", views=1, topk=2, progress=False)
    assert not (tmp_path / "refused").exists()
    x, y, key = next(iter(DataLoader(recorded, batch_size=4)))
    student(x)
    with pytest.raises(RecordError, match=f"only the 2 largest logits, but .*{why}"):
        kd.loss(y, recorded=key)
