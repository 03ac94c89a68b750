"""The auto-encoder over two ranks with unequal data: one result, and that of the two together."""

import pytest
import torch

from kdlayers.losses import InheritExploreLoss
from tests.two_ranks import connect, on_two_ranks


def batches(rank):
    draw = torch.Generator().manual_seed(rank)
    return [(torch.randn(4, 5, 3, 3, generator=draw).relu(), None) for _ in range(1 + rank)]


def fit(rank):
    return InheritExploreLoss(factor_channels=3, epochs=1).fit(batches(rank), seed=2)


def work(rank, folder):
    connect(rank)
    torch.save(fit(rank).state_dict(), f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_ranks_take_the_mean_of_their_weights_after_a_pass(tmp_path):
    on_two_ranks(work, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = [fit(rank).state_dict() for rank in range(2)]
    for key, value in first.items():
        if key.endswith("num_batches_tracked"):
            continue
        assert torch.equal(second[key], value), key
        if value.is_floating_point():
            mean = (alone[0][key] + alone[1][key]) / 2
            torch.testing.assert_close(value, mean, msg=key)
    assert first["is_fitted"]
    assert not torch.equal(alone[0]["auto_encoder.encoder.1.weight"], first[
        "auto_encoder.encoder.1.weight"
    ])  # fmt: skip


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_needs_no_process_group(rank):
    assert fit(rank).fitted
