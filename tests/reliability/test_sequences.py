"""Random sequences of calls: each works or raises an error of ours, and no value is wrong."""

import pytest

from kdlayers._step import tape
from tests.reliability import sequences

pytestmark = pytest.mark.filterwarnings("ignore::kdlayers.errors.KDLayersWarning")


@pytest.mark.slow
def test_random_sequences_of_calls():
    counts = sequences.run(60, seed=0)
    assert counts["tried"] == 60
    assert counts["refused"] > 60
    assert counts["calls"] > 2 * counts["refused"]
    assert counts["silently wrong"] == counts["raw errors"] == 0


def test_the_model_notices_a_missing_check(monkeypatch):
    monkeypatch.setattr(tape, "_check_unchanged", lambda *_, **__: None)
    sequence = sequences.Sequence(0)
    for call in ("attach", "fit", "forward", "change_logits"):
        getattr(sequence, call)()
    sequence.call_loss(sequence.last.index)
    assert sequence.counts["silently wrong"] == 1
