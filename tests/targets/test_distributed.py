"""Fits over two ranks: equal on both, and equal to one process where the sample holds all rows."""

import pytest
import torch

from kdlayers import CodebookTargets, DecisionTargets
from kdlayers._targets import codebook_fit, decision_fit
from kdlayers.errors import FitError
from tests.two_ranks import connect, on_two_ranks

pytestmark = pytest.mark.slow
ALL, MORE = 300, 2400
"""Rows that the samples hold, and rows that need every pass."""


def small_samples(set_attribute):
    set_attribute(codebook_fit, "ROWS_PER_CENTER", 32)
    set_attribute(decision_fit, "ROWS_PER_SUBCLASS", 32)
    for module in (codebook_fit, decision_fit):
        set_attribute(module, "SMALL_SAMPLE", 0)


def share(rank, n):
    """Batches of one rank, or of both together: unequal parts, the first one without class 3."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    features = (torch.randn(4, 6, generator=generator) * 2)[labels]
    features = features + torch.randn(n, 6, generator=generator)
    first = torch.arange(n) % 8 < 3
    mine = {0: first, 1: ~first, None: first | True}[rank]
    return list(zip(features[mine].split(37), labels[mine].split(37), strict=True))


def fit_all(rank):
    states = {}
    for n in (ALL, MORE):
        batches = share(rank, n)
        decisions = DecisionTargets(3, components=2).fit(batches, seed=1)
        codebook = CodebookTargets(12).fit(batches, seed=1)
        states[n] = {"codebook": codebook.state_dict(), "decisions": decisions.state_dict()}
    return states


def work(rank, folder):
    small_samples(setattr)
    connect(rank)
    torch.save(fit_all(rank), f"{folder}/{rank}.pt")


def fail(rank, folder):
    connect(rank)
    batches = share(rank, ALL)
    batches[1][0][0] = torch.nan if rank else 0.0
    for targets in (CodebookTargets(4), DecisionTargets(1)):
        said = "NaN or infinite" if rank else "rank 1 failed: .*NaN or infinite"
        with pytest.raises(FitError, match=said):
            targets.fit(batches)
        with pytest.raises(FitError, match="empty loader" if rank == 0 else "rank 0 failed"):
            targets.fit([] if rank == 0 else share(rank, ALL))
    # Rows that do not fill a block are looked at after the last batch.
    ours = [(x, y if rank else torch.full_like(y, -1)) for x, y in share(rank, ALL)]
    with pytest.raises(FitError, match="rank 0 failed" if rank else "-1"):
        DecisionTargets(1).fit(ours)
    ignored = [(x, torch.full_like(y, 9) if rank else y) for x, y in share(rank, ALL)]
    with pytest.raises(FitError, match="without a single row"):
        DecisionTargets(1, ignore_index=9).fit(ignored)
    torch.save(rank, f"{folder}/{rank}.pt")


def test_what_fails_on_one_rank_is_an_error_on_both(tmp_path):
    on_two_ranks(fail, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    on_two_ranks(work, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    with pytest.MonkeyPatch.context() as patch:
        small_samples(patch.setattr)
        return fit_all(None)


CASES = [(n, kind) for n in (ALL, MORE) for kind in ("codebook", "decisions")]


@pytest.mark.parametrize(("n", "kind"), CASES)
def test_ranks_end_with_the_same_targets(ranks, n, kind):
    one, two = (rank[n][kind] for rank in ranks)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("kind", ["codebook", "decisions"])
def test_ranks_agree_with_one_process_where_the_sample_holds_all_rows(ranks, alone, kind):
    for name, value in ranks[0][ALL][kind].items():
        torch.testing.assert_close(value, alone[ALL][kind][name], rtol=1e-4, atol=1e-5)


def test_ranks_agree_with_one_process_where_rows_are_sampled(ranks, alone):
    together, single = ranks[0][MORE], alone[MORE]
    assert together["codebook"]["counts"].sum() == MORE
    assert together["decisions"]["counts"].sum() == MORE
    inertia = [float(s["codebook"]["inertia"]) for s in (together, single)]
    assert inertia[0] == pytest.approx(inertia[1], rel=0.03)
    # The discriminant analysis adds up all rows, whatever was sampled.
    torch.testing.assert_close(
        together["decisions"]["projection"], single["decisions"]["projection"], rtol=1e-4, atol=1e-5
    )
