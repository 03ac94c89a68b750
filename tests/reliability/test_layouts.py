"""A few hundred tries of sizes and layouts; `python -m tests.reliability --layouts N` runs more."""

import random

import pytest

from tests.reliability.layouts import known, one_of_the_zoo, run


@pytest.mark.slow
def test_nothing_is_read_the_wrong_way_round():
    counts = run(300, seed=7)
    assert counts["silently wrong"] == 0
    assert counts["tried"] == 300
    # Most tries can be answered; a library that refused everything would be reliable too.
    assert counts["right"] > 200


@pytest.mark.zoo
@pytest.mark.parametrize("seed", range(100))
def test_architectures_where_channels_are_as_many_as_rows_or_columns(seed):
    assert one_of_the_zoo(random.Random(seed)) != "silently wrong"


@pytest.mark.slow
def test_the_zoo_knows_both_layouts():
    assert set(known("resnet18")[1].values()) == {"NCHW"}
    assert "NHWC" in known("swin_t")[1].values()
