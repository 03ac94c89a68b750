"""The largest logits and the rest's mass, against a loop over classes."""

import math

import pytest
import torch

from kdlayers._records.topk import compress, expand


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
