"""The benchmarks run, their output files are complete, and their statistics are right."""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmark_modules import FOLDER, load

LINUX = Path("/proc/self/clear_refs").exists()
POSITIVE = st.floats(1e-3, 1e3)


def run(folder, script, *options):
    """The JSON that a script saves, run in a process of its own."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), "--quick", *options]
    done = subprocess.run(
        [*command, "--threads", "1", "--out", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    name = f"{script}-{options[1]}" if "--part" in options else script
    report = json.loads((folder / f"{name}.json").read_text())
    markdown = (folder / f"{name}.md").read_text()
    for table in report["tables"]:
        assert f"## {table['title']}" in markdown
        assert f"## {table['title']}" in done.stdout
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
    return report


@pytest.mark.parametrize("script", sorted(FOLDER.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_every_script_explains_itself_in_a_process_of_its_own(script):
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: {script.name}")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Runs each script once."""
    folder, done = tmp_path_factory.mktemp("benchmarks"), {}
    options = {
        "step": ["--part", "alone"],
        "losses": [],
        "scale": ["--no-memory"],
        "inference": ["--no-compile", "--no-memory"],
    }

    def report(script):
        if script not in done:
            done[script] = run(folder, script, *options[script])
        return done[script]

    report.folder = folder
    return report


def check_numbers(report, rounds=3):
    for times in report["times_ms"].values():
        for values in times.values():
            assert len(values) == rounds
            assert min(values) > 0
    for comparison in report["comparisons"]:
        ratio = comparison["ratio"]
        assert 0 < ratio["low"] <= ratio["middle"] <= ratio["high"], comparison


def check_ratio(report, case, ours, alternative):
    """The ratio that was saved is the median of the rounds' ratios."""
    times = report["times_ms"][case]
    rounds = [a / b for a, b in zip(times[ours], times[alternative], strict=True)]
    saved = [
        c["ratio"]["middle"]
        for c in report["comparisons"]
        if (c["case"], c["ours"], c["alternative"]) == (case, ours, alternative)
        and c["quantity"] == "time"
    ]
    assert saved == [pytest.approx(statistics.median(rounds))]


# ---------------------------------------------------------------- the scripts


def test_kd_part_alone(reports):
    report, variants = reports("step"), load("_cases").VARIANTS
    check_numbers(report)
    assert len(report["times_ms"]) == 2  # letKD-1 and letKD-2
    for case, times in report["times_ms"].items():
        assert tuple(times) == variants
        check_ratio(report, case, "kdlayers", "plain")
        if LINUX:
            peaks = report["memory_mib"][case]
            assert tuple(peaks) == variants
            assert min(peaks.values()) > 10  # a process with torch
    assert report["machine"]["threads"] == 1
    assert report["machine"]["packages"]["torch"].startswith(torch.__version__.split("+")[0])


def test_whole_steps(tmp_path):
    report = run(tmp_path, "step", "--part", "step", "--no-memory")
    check_numbers(report)
    for case, times in report["times_ms"].items():
        assert tuple(times) == load("_cases").VARIANTS
        check_ratio(report, case, "kdlayers", "floor")
        check_ratio(report, case, "kdlayers", "plain")
    assert report["memory_mib"] == {}


def test_recorded_step(tmp_path):
    report = run(tmp_path, "recorded_step")
    check_numbers(report)
    assert len(report["times_ms"]) == 2  # KD, letKD-1 + KD
    for case, times in report["times_ms"].items():
        others = ["student alone", "in memory", "live teacher"]
        assert list(times) == [*others[:2], "recorded", others[2]]
        for other in others:
            check_ratio(report, case, "recorded", other)


def test_the_steps_of_recorded_step_have_equal_losses(tmp_path):
    benchmark = load("recorded_step")
    case = benchmark.quick(benchmark.CASES["CIFAR ResNet-56 to ResNet-20"])
    for method in benchmark.METHODS:
        steps = benchmark.build(case, method, str(tmp_path / method), "cpu")
        for _ in range(2 * benchmark.BATCHES):
            _, memory, recorded, live = (float(step()) for step in steps.values())
            assert memory == pytest.approx(live, rel=1e-5)
            assert recorded == pytest.approx(live, rel=2e-2)  # float16, and what follows from it


def test_topk_measures_what_is_lost():
    topk = load("topk")
    torch.manual_seed(0)
    ours, theirs = torch.randn(200, 30), 3 * torch.randn(200, 30)
    head, _, rest, *losses = topk.rows(ours, theirs, torch.arange(200) % 30, (3, 30))
    assert head == ["", "all logits", "`topk=3`", "`topk=30`"]
    expected = 1 - theirs.softmax(1).topk(3).values.sum(1).mean()
    assert rest[2:] == [f"{100 * float(expected):.2g} %", "0 %"]
    log_p, log_q = (x.log_softmax(1) for x in (theirs, ours))
    value = (log_p.exp() * (log_p - log_q)).sum(1).mean()
    assert losses[0][:2] == ["KDLoss, temperature 1", f"{float(value):.4g}"]
    top, order = log_p.exp().sort(1, descending=True)
    q = log_q.gather(1, order)
    left = top[:, 3:].sum(1, keepdim=True)  # shared equally by 27 classes
    near = (top[:, :3] * (top[:, :3].log() - q[:, :3])).sum(1)
    near = (near + (left / 27 * ((left / 27).log() - q[:, 3:])).sum(1)).mean()
    found = float(losses[0][2].split(" %")[0]) / 100
    assert found == pytest.approx(float(near / value) - 1, rel=0.1)


def test_losses(reports):
    report = reports("losses")
    check_numbers(report)
    *alone, step = report["times_ms"].values()
    assert [set(times) >= {"kdlayers", "textbook"} for times in alone] == [True] * (10 + 6)
    assert len(step) == 1 + 10 + 1  # the step without a loss, each loss, and the first once more
    check_ratio(report, "DKD, logits 8x10", "kdlayers", "textbook")


def test_scale(reports):
    report = reports("scale")
    check_numbers(report)
    sizes = ["templates 16", "templates 64", "positions 128", "positions 512"]
    assert list(report["times_ms"]) == [*sizes, "channels 8", "channels 32"]
    times = [statistics.median(report["times_ms"][name]["kdlayers"]) for name in sizes[:2]]
    slope = np.polyfit(np.log([16, 64]), np.log(times), 1)[0]
    assert float(report["tables"][0]["rows"][0][-1]) == pytest.approx(slope, abs=0.006)


def test_inference(reports):
    report = reports("inference")
    check_numbers(report)
    inference = load("inference")
    *students, _, _ = report["times_ms"].values()
    assert [tuple(times) for times in students] == [inference.VARIANTS] * 2
    held = {row[0]: int(row[1].replace(",", "")) for row in report["tables"][0]["rows"]}
    assert held["pruned and folded"] < held["folded"] < held["with KD layers"]
    assert held["student"] < held["pruned"] < held["with KD layers"]


def test_pages(reports, tmp_path):
    scripts = ("step", "losses", "scale", "inference")
    for script in scripts:
        reports(script)
    page = tmp_path / "performance.md"
    command = [sys.executable, str(FOLDER / "page.py"), str(reports.folder), str(page)]
    subprocess.run(command, check=True, capture_output=True)
    first = page.read_text()
    headings = [line[3:] for line in first.splitlines() if line.startswith("## ")]
    assert headings == ["What it costs", "Measurements", "Aims", "How to read the tables"]
    names = sorted(path.stem for path in tmp_path.glob("*.md"))
    assert names == sorted(
        ["performance", *(f"performance-{s}" for s in (*scripts, "alternatives"))]
    )
    for script in scripts:
        report, text = reports(script), (tmp_path / f"performance-{script}.md").read_text()
        assert f"[{report['title']}](performance-{script}.md)" in first
        for table in report["tables"]:
            assert f"\n## {table['title']}\n" in text
            assert "| " + " | ".join(table["rows"][-1]) + " |" in text
        assert f"python examples/benchmarks/{script}.py --quick" in text
    # The costs are ratios within each round; the small networks are in the first column.
    inference = reports("inference")["times_ms"]["ResNet-20, 16x16, batch 4"]
    ratios = [a / b for a, b in zip(inference["folded"], inference["student"], strict=True)]
    row = next(line for line in first.splitlines() if line.startswith("| the same, folded |"))
    assert float(row.split(" | ")[1].split(" ")[0]) == pytest.approx(np.median(ratios), abs=0.006)
    assert row.endswith("| not measured | not measured |")


def test_the_committed_pages_are_those_of_the_committed_numbers():
    page, docs = load("page"), FOLDER.parents[1] / "docs"
    files = sorted((docs / "data" / "performance").glob("*.json"), key=page.order)
    found = page.pages([json.loads(file.read_text()) for file in files], "performance.md")
    assert len(found) == 8
    assert {name: (docs / name).read_text() for name in found} == found


def test_page_names_every_loss(reports):
    report, summary = reports("losses"), load("_performance_summary")
    ratio = {"low": 1.2, "middle": 1.5, "high": 2.0}
    worse = {"case": "X", "quantity": "time", "ours": "kdlayers", "alternative": "plain"}
    even = worse | {"case": "Y", "ratio": ratio | {"low": 0.9}}
    text = summary.slower([report | {"comparisons": [worse | {"ratio": ratio}, even]}])
    assert "| X | time | kdlayers | plain | 1.50 (1.20 to 2.00) |" in text
    assert "| Y |" not in text
    assert "no ratio" in summary.slower([report | {"comparisons": [even]}])


def test_page_needs_data(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "page.py"), str(tmp_path), str(tmp_path / "page.md")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "run the benchmarks with --out" in done.stderr


@pytest.mark.slow
def test_stability_has_three_seeds_of_every_loss():
    done = subprocess.run(
        [sys.executable, str(FOLDER / "stability.py"), "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [line for line in done.stdout.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1].split("(")[0] for row in rows] == [
        "DKDLoss", *["AEKTLoss"] * 3, "KDLoss", *["StudentFriendlyKDLoss"] * 2
    ]  # fmt: skip
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert all(len(accuracies.split(", ")) == 3 for _, accuracies, _ in cells)
    assert [bool(agreements) for *_, agreements in cells] == [False] * 5 + [True] * 2


@pytest.mark.parametrize("name", sorted(file.name for file in FOLDER.glob("*.py")))
def test_scripts_are_short(name):
    assert len((FOLDER / name).read_text("utf-8").splitlines()) <= 400


# ---------------------------------------------------------------- statistics


@given(st.lists(POSITIVE, min_size=1, max_size=20), st.floats(0, 1))
def test_quantile_is_numpys(values, share):
    assert load("_timing").quantile(values, share) == pytest.approx(np.quantile(values, share))


@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=1, max_size=20))
def test_ratio_is_taken_round_by_round(pairs):
    ours, theirs = zip(*pairs, strict=True)
    found = load("_timing").ratio(ours, theirs)
    rounds = np.array(ours) / np.array(theirs)
    expected = np.quantile(rounds, [0.5, 0.25, 0.75])
    assert [found.middle, found.low, found.high] == pytest.approx(list(expected))


def test_ratio_ignores_what_slows_both():
    timing = load("_timing")
    machine = np.array([1.0, 10.0, 1.0, 50.0, 3.0])
    assert timing.ratio(2 * machine, 4 * machine) == timing.Spread(0.5, 0.5, 0.5)


@given(st.floats(-2, 3), POSITIVE, st.lists(POSITIVE, min_size=2, max_size=8, unique=True))
def test_exponent_of_a_power(power, constant, sizes):
    sizes = [round(size, 2) for size in sizes]
    if len(set(sizes)) < 2 or min(sizes) == 0:
        return
    values = [constant * size**power for size in sizes]
    assert load("_timing").exponent(sizes, values) == pytest.approx(power, abs=1e-6)


def test_digits():
    digits = load("_timing").digits
    assert [digits(v) for v in (0.1234, 9.876, 12.34, 123.4, -1.5)] == [
        "0.12", "9.88", "12.3", "123", "-1.50",
    ]  # fmt: skip


def test_variants_take_turns():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "ABC"}
    times = load("_timing").alternate(steps, 4, least=0)
    assert "".join(called) == "AABBCC" + 4 * "ABC"
    assert {name: len(values) for name, values in times.items()} == dict.fromkeys("ABC", 4)


def test_short_steps_are_called_several_times():
    times = load("_timing").alternate({"A": lambda: sum(range(1000))}, 3, least=0.005)
    assert max(times["A"]) < 1  # ms of one call, not of a turn


@pytest.mark.skipif(not LINUX, reason="reads /proc")
def test_peak_memory_sees_what_is_freed_again(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)  # for the processes that it starts
    timing, cases = load("_timing"), load("_cases")
    case = cases.Case(None, 4, (8, 8), 16, 16, 64)
    floor, plain = (timing.peak_memory(cases.build, case, v) for v in ("floor", "plain"))
    big = timing.peak_memory(cases.build, replace(case, batch=64, templates=1024), "plain")
    map_of_scores = 64 * 64 * 1024 * 4 / 2**20
    assert floor < plain < big
    assert 3 * map_of_scores < big - floor < 20 * map_of_scores


@pytest.mark.parametrize(
    ("quartiles", "expected"),
    [
        ([(0.2, 0.25, 0.3), (0.1, 0.2, 0.33)], "reached"),
        ([(0.2, 0.25, 0.3), (0.34, 0.4, 0.5)], "missed in 1 of 2"),
        ([(0.2, 0.25, 0.4)], "undecided"),
    ],
)
def test_verdict_on_an_aim(quartiles, expected):
    summary, spread = load("_performance_summary"), load("_timing").Spread
    ratios = [spread(low=low, middle=middle, high=high) for low, middle, high in quartiles]
    assert summary.verdict(ratios, 1 / 3) == expected
