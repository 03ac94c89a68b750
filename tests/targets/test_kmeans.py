"""k-means, its sample, and its random numbers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.cluster import KMeans

from kdlayers._targets import distances, seeding
from kdlayers._targets.distances import Search, closeness, nearest, nearest_index, sums_by_index
from kdlayers._targets.hash import counter_keys, derive_seed, row_tags
from kdlayers._targets.kmeans import kmeans, lloyd, principal_axes
from kdlayers._targets.reservoir import Reservoir
from kdlayers._targets.rows import BLOCK, Blocks
from kdlayers._utils import chunks

CPU = torch.device("cpu")


def blobs(groups, size, width, spread=0.1, scale=10.0):
    middles = torch.randn(groups, width) * scale
    return (middles.unsqueeze(1) + spread * torch.randn(groups, size, width)).reshape(-1, width)


# ---------------------------------------------------------------- distances


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearest_agrees_with_subtraction(dtype, monkeypatch):
    rows, centers = torch.randn(101, 7, dtype=dtype), torch.randn(13, 7, dtype=dtype)
    naive = ((rows[:, None] - centers[None]) ** 2).sum(-1)
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 13 * 10)  # several chunks and a tail
    distance, index = nearest(rows, centers)
    assert torch.equal(index, naive.argmin(1))
    torch.testing.assert_close(distance, naive.amin(1))


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 2**31), st.sampled_from([1, 100]))
def test_search_by_lanes_is_exact_and_takes_the_first_on_ties(k, n, seed, values):
    generator = torch.Generator().manual_seed(seed)
    # Small integers: every product is exact, and with 1 value there are ties everywhere.
    rows, centers = (
        torch.randint(-values, values + 1, (m, 3), generator=generator) for m in (n, k)
    )
    naive = ((rows[:, None] - centers[None]) ** 2).sum(-1)
    search = Search(centers.double(), torch.zeros(3, dtype=torch.float64))
    value, index = search.best(rows.double())
    first = (naive == naive.amin(1, keepdim=True)).long().argmax(1)
    assert torch.equal(index, first)
    squares = rows.double().square().sum(1)
    assert torch.equal(squares - 2 * value, naive.amin(1).double())


@pytest.mark.parametrize("k", [127, 128, 129, 4096])
def test_nearest_agrees_with_exact_distances_in_float32(k):
    rows, centers = torch.randn(300, 24), torch.randn(k, 24)
    exact = torch.cdist(rows.double(), centers.double()).square()
    found = exact.gather(1, nearest_index(rows, centers).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(found, exact.amin(1), rtol=1e-5, atol=0)


def test_a_common_offset_costs_no_digits():
    rows, centers = torch.randn(50, 8), torch.randn(6, 8)
    moved = closeness(rows + 1000.0, centers + 1000.0)
    plain = closeness(rows, centers)
    # Closeness is known up to a constant of each row.
    torch.testing.assert_close(
        moved - moved[:, :1], plain - plain[:, :1], atol=2e-2, rtol=0.0
    )  # adding 1000 rounds the inputs themselves to 6e-5


def test_split_product_survives_rounded_factors():
    rows, centers = torch.randn(40, 64) * 7, torch.randn(30, 64) * 7
    exact = rows.double() @ centers.double().T

    def rounded(a, b):  # what TensorFloat-32 does to the factors
        return distances._high_bits(a) @ distances._high_bits(b).T

    high_r, high_c = distances._high_bits(rows), distances._high_bits(centers)
    by_parts = rounded(high_r, high_c) + (
        rounded(high_r, centers - high_c) + rounded(rows - high_r, high_c)
    )
    assert (rounded(rows, centers) - exact).abs().max() > 0.1
    assert (by_parts - exact).abs().max() < 2e-3
    torch.testing.assert_close(
        distances._split_product(rows, centers), exact.float(), atol=2e-3, rtol=0
    )


def test_sums_by_index_agrees_with_a_loop():
    rows, index = torch.randn(100, 3), torch.randint(5, (100,))
    sums = sums_by_index(rows, index, 6)
    for k in range(6):
        expected = rows[index == k].double().sum(0)
        torch.testing.assert_close(sums[k], expected, rtol=1e-5, atol=1e-5)
    assert sums.dtype == torch.float64


# ---------------------------------------------------------------- k-means


@pytest.mark.parametrize("k", [1, 5, 20])
@pytest.mark.parametrize("width", [2, 16])
def test_inertia_is_as_low_as_scikit_learns(k, width):
    rows = torch.cat([torch.randn(600, width), torch.rand(600, width) * 4])
    ours = kmeans(rows, k, seed=0).inertia
    theirs = KMeans(k, n_init=3, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    assert ours < 1.03 * theirs


def test_inertia_with_many_centres_seeded_in_rounds(monkeypatch):
    monkeypatch.setattr(seeding, "GREEDY_LIMIT", 8)
    rows = torch.randn(3000, 6)
    ours = kmeans(rows, 120, seed=0).inertia
    theirs = KMeans(120, n_init=1, random_state=0).fit(rows.numpy()).inertia_ / len(rows)
    assert ours < 1.03 * theirs


@pytest.mark.parametrize("seed", range(5))
def test_no_obvious_cluster_is_left_empty(seed):
    torch.manual_seed(seed)
    rows = blobs(30, 20, 8)
    result = kmeans(rows, 30, seed=seed)
    assert result.counts.tolist() == [20] * 30
    assert result.inertia < 0.02 * 8


def test_no_obvious_cluster_is_left_empty_when_seeded_in_rounds(monkeypatch):
    monkeypatch.setattr(seeding, "GREEDY_LIMIT", 4)
    rows = blobs(100, 10, 16, spread=0.01)
    assert kmeans(rows, 100, seed=0).counts.tolist() == [10] * 100


def mixed(n, width, rank):
    """Rows as a network gives them: few strong directions, half the entries 0."""
    hidden = torch.randn(n, rank) + 2 * torch.randn(40, rank)[torch.randint(40, (n,))]
    return (hidden @ torch.randn(rank, width) + 0.3 * torch.randn(n, width)).relu()


@pytest.mark.parametrize(("width", "rank"), [(24, 8), (192, 8), (192, 192)])
def test_stages_reach_the_inertia_of_scikit_learn(width, rank):
    """Growing parts of the rows, first on few axes if these hold most of the variance."""
    rows = mixed(80 * 160, width, rank)
    ours = kmeans(rows, 80, seed=0)
    theirs = KMeans(80, n_init=1, random_state=0, max_iter=100).fit(rows.numpy())
    assert ours.inertia < 1.01 * theirs.inertia_ / len(rows)
    assert ours.counts.sum() == len(rows)
    distance, index = nearest(rows, ours.centers)
    torch.testing.assert_close(ours.inertia, distance.double().mean())
    assert torch.equal(ours.counts, torch.bincount(index, minlength=80))


@pytest.mark.parametrize("width", [16, 128])
@pytest.mark.parametrize("first", [True, False])
def test_many_equal_rows_side_by_side_do_not_matter(width, first):
    """Dark margins give equal rows, which a sample that is sorted by content holds together."""
    equal = torch.zeros(8000, width)
    others = mixed(12_000, width, 8)
    rows = torch.cat([equal, others] if first else [others, equal])
    theirs = KMeans(100, n_init=1, random_state=0, max_iter=100).fit(rows.numpy())
    assert kmeans(rows, 100, seed=0).inertia < 1.03 * theirs.inertia_ / len(rows)


def test_principal_axes_hold_their_share():
    rows = mixed(3000, 160, 6)
    axes, mean = principal_axes(rows, 0.9)
    assert axes.shape[1] % 16 == 0
    torch.testing.assert_close(axes.T @ axes, torch.eye(axes.shape[1]), atol=1e-4, rtol=0)
    centred = rows - mean
    assert (centred @ axes).square().sum() >= 0.9 * centred.square().sum()
    assert (centred @ axes[:, :-16]).square().sum() < 0.9 * centred.square().sum()


def test_iterations_survive_a_large_common_offset():
    rows = mixed(80 * 64, 12, 6)
    plain, moved = (kmeans(rows + offset, 80, seed=0).inertia for offset in (0.0, 1000.0))
    assert moved < 1.02 * plain


def test_centres_are_the_means_of_their_rows():
    rows = torch.randn(500, 4, dtype=torch.float64)
    result = kmeans(rows, 9, seed=3)
    naive = ((rows[:, None] - result.centers[None]) ** 2).sum(-1)
    for k in range(9):
        mine = rows[naive.argmin(1) == k]
        torch.testing.assert_close(result.centers[k], mine.mean(0))
        assert result.counts[k] == len(mine)
    torch.testing.assert_close(result.inertia, naive.amin(1).mean())


def test_rounds_draw_as_one_by_one(monkeypatch):
    """The second and third of three seeds have the distribution of plain k-means++."""
    rows = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    squares = (rows - rows.T) ** 2
    expected = torch.zeros(4, 4, 4)
    for a in range(4):
        for b in range(4):
            after = torch.minimum(squares[a], squares[b])
            for c in range(4):
                if len({a, b, c}) == 3:
                    one, two = squares[a, b] / squares[a].sum(), after[c] / after.sum()
                    expected[a, b, c] = one * two / 4
    counts = torch.zeros(4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        counts[tuple(seeding._rejection_seeds(rows, 3, generator).tolist())] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    p = stats.chisquare(
        counts[possible].numpy(), (expected[possible] * 1500).numpy(), sum_check=False
    )
    assert p.pvalue > 0.001


def test_dead_centres_move_to_the_farthest_rows():
    rows = torch.tensor([[0.0], [1.0], [100.0], [101.0]])
    result = lloyd(rows, torch.tensor([[0.5], [-1000.0]]))
    assert sorted(result.centers.flatten().tolist()) == [0.5, 100.5]
    assert result.counts.tolist() == [2, 2]


@pytest.mark.parametrize("limit", [512, 2])
def test_fewer_distinct_rows_than_centres_gives_no_nan(limit, monkeypatch):
    monkeypatch.setattr(seeding, "GREEDY_LIMIT", limit)
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).repeat(10, 1)
    result = kmeans(rows, 7, seed=0)
    assert result.centers.isfinite().all()
    assert result.counts.sum() == 30
    assert result.inertia == 0


def test_same_seed_same_centres_and_global_state_is_untouched():
    rows = torch.randn(400, 3)
    before = torch.get_rng_state()
    first, second = kmeans(rows, 6, seed=5), kmeans(rows, 6, seed=5)
    assert torch.equal(first.centers, second.centers)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(first.centers, kmeans(rows, 6, seed=6).centers)


# ---------------------------------------------------------------- the sample


def fill(reservoir, rows, sizes, groups=None):
    start = 0
    for size in sizes:
        part = slice(start, start + size)
        reservoir.add(rows[part], None if groups is None else groups[part])
        start += size
    return reservoir


def test_every_position_is_kept_with_the_same_probability():
    rows = torch.arange(5000.0).unsqueeze(1)
    counts = torch.zeros(20)
    for seed in range(20):
        sample = fill(Reservoir(500, seed), rows, [1000] * 5).merged()
        assert len(sample.rows) == 500
        counts += torch.bincount(sample.rows.flatten().long() // 250, minlength=20)
    assert stats.chisquare(counts.numpy()).pvalue > 0.001


def test_pairs_of_neighbours_are_kept_independently():
    rows = torch.arange(4000.0).unsqueeze(1)
    both = 0
    for seed in range(20):
        kept = torch.zeros(4000, dtype=torch.bool)
        kept[fill(Reservoir(1000, seed), rows, [4000]).merged().rows.flatten().long()] = True
        both += int((kept[:-1] & kept[1:]).sum())
    mean, deviation = 20 * 3999 / 16, math.sqrt(20 * 3999 / 16 * 15 / 16)
    assert abs(both - mean) < 4 * deviation


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=8),
    st.integers(1, 40),
    st.integers(1, 5),
)
def test_sample_does_not_depend_on_batches_and_is_bounded(sizes, capacity, groups):
    total = sum(sizes)
    rows = torch.arange(float(total)).unsqueeze(1)
    labels = torch.arange(total) % groups
    whole = fill(Reservoir(capacity, 0, groups=groups), rows, [total], labels)
    parts = fill(Reservoir(capacity, 0, groups=groups), rows, sizes, labels)
    assert parts.held <= 1.25 * capacity * groups + max(sizes)
    one, two = whole.merged(), parts.merged()
    assert torch.equal(one.rows, two.rows)
    assert torch.equal(one.groups, two.groups)
    assert one.complete == (max(torch.bincount(labels).tolist()) <= capacity)
    kept = [min(capacity, n) for n in torch.bincount(labels, minlength=groups).tolist()]
    assert torch.bincount(two.groups, minlength=groups).tolist() == kept
    assert torch.equal(labels[two.rows.flatten().long()], two.groups)


def test_complete_sample_is_sorted_by_content():
    rows = torch.randn(200, 4)
    shuffled = rows[torch.randperm(200)]
    one = fill(Reservoir(300, 0), rows, [200]).merged()
    two = fill(Reservoir(300, 1), shuffled, [50] * 4).merged()
    assert one.complete
    assert torch.equal(one.rows, two.rows)


def test_sample_holds_a_bounded_number_of_rows_of_a_long_stream():
    reservoir, most = Reservoir(1000, 0), 0
    for _ in range(100):
        reservoir.add(torch.randn(BLOCK, 2))
        most = max(most, reservoir.held)
    assert reservoir.added == 100 * BLOCK
    assert most <= 1250 + BLOCK
    assert len(reservoir.merged().rows) == 1000


# ---------------------------------------------------------------- hashes and blocks


def test_keys_are_uniform_and_do_not_depend_on_where_they_start():
    keys = counter_keys(0, 20000, derive_seed(3, 0), CPU)
    assert torch.equal(keys[500:700], counter_keys(500, 200, derive_seed(3, 0), CPU))
    assert keys.min() >= 0
    assert len(keys.unique()) == 20000
    assert stats.kstest(keys.double().numpy() / 2**63, "uniform").pvalue > 0.001
    other = counter_keys(0, 20000, derive_seed(3, 1), CPU)
    assert abs(stats.pearsonr(keys.double().numpy(), other.double().numpy()).statistic) < 0.03


def test_mixing_agrees_with_plain_integers():
    def splitmix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        return x ^ (x >> 31)

    seed = derive_seed(7, 2)
    expected = [(splitmix((i * 0x9E3779B97F4A7C15 + seed) % 2**64)) % 2**63 for i in range(50)]
    assert counter_keys(0, 50, seed, CPU).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tags_depend_on_the_content_of_rows(dtype):
    bits = (torch.arange(2**12).unsqueeze(1) >> torch.arange(12)) & 1
    tags = row_tags(bits.to(dtype))
    assert len(tags.unique()) == 2**12
    assert torch.equal(row_tags(bits.to(dtype).flip(0)), tags.flip(0))
    zeros = torch.zeros(1, 3, dtype=dtype)
    assert torch.equal(row_tags(zeros), row_tags(-zeros))


@given(st.lists(st.integers(0, 2 * BLOCK + 3), min_size=1, max_size=5))
def test_blocks_are_full_but_the_last(sizes):
    rows = torch.arange(float(sum(sizes))).unsqueeze(1)
    blocks, out = Blocks(), []
    for part in rows.split(sizes):
        out += blocks.push(part, part.flatten().long())
    assert all(len(block) == BLOCK for block, _ in out)
    out += blocks.flush()
    assert not blocks.flush()
    assert torch.equal(torch.cat([rows[:0], *(block for block, _ in out)]), rows)
    for block, labels in out:
        assert torch.equal(labels, block.flatten().long())


@pytest.mark.filterwarnings("ignore:Please use the new API settings:UserWarning")  # torch 2.9
def test_tf32_flags_are_read_and_compiled_graphs_assume_tf32():
    def choose(x):
        return x + 1 if distances._tensor_float() else x - 1

    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("highest", -1.0), ("high", 1.0)):
            torch.set_float32_matmul_precision(precision)
            torch.compiler.reset()
            compiled = torch.compile(choose, fullgraph=True, backend="eager")
            assert choose(torch.zeros(())) == expected
            assert compiled(torch.zeros(())) == 1.0
    finally:
        torch.set_float32_matmul_precision(before)
