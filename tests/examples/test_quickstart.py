"""The quickstart runs end to end, and its table tells the truth about its numbers."""

import re
import statistics
import subprocess
import sys

import pytest
from scipy import stats

from tests.examples import EXAMPLES

SCRIPT = EXAMPLES / "quickstart.py"


@pytest.fixture(scope="module")
def report():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import _report
    finally:
        sys.path.remove(str(EXAMPLES))
    return _report


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--out", str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", ["labels only", "KD", "letKD-1", "letKD-2"])
def test_every_method_has_its_row(output, method):
    row = re.search(rf"^{method} +(\d+\.\d+) ± (\d+\.\d+) +([\d,]+) +(\d+\.\d)$", output, re.M)
    assert row is not None, output
    assert 0 <= float(row[1]) <= 100
    assert float(row[4]) > 0


def test_the_mean_is_that_of_the_seeds(output):
    runs = re.findall(r"^letKD-2 +seed \d of 2: (\d+\.\d+) %", output, re.M)
    mean = re.search(r"^letKD-2 +(\d+\.\d+) ±", output, re.M)
    assert len(runs) == 2
    assert statistics.mean(map(float, runs)) == pytest.approx(float(mean[1]), abs=0.011)


def test_layers_cost_parameters(output):
    rows = dict(re.findall(r"^(\S[^±\n]*?) +[\d.]+ ± [\d.]+ +([\d,]+)", output, re.M))
    counts = {name: int(count.replace(",", "")) for name, count in rows.items()}
    assert counts["labels only"] == counts["KD"]
    # One layer of 16 templates on 64 channels: 2KC + 2K + 2.
    assert counts["letKD-1"] - counts["KD"] == 2 * 16 * 64 + 2 * 16 + 2


def test_says_whether_letkd_wins(output):
    lines = [line for line in output.splitlines() if "letKD-2 against" in line]
    assert len(lines) == 2
    assert all(re.search(r"(is better|is worse|not separated)\.$", line) for line in lines)


def test_reloaded_student_predicts_the_same(output):
    found = re.search(r"^(\d+) of (\d+) predictions are the same", output, re.M)
    assert found is not None, output
    assert found[1] == found[2] == "300"


def test_help_explains_every_option():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True
    )
    options = re.findall(r'add\("(--[\w-]+)"', SCRIPT.read_text("utf-8"))
    assert len(options) > 15
    assert [option for option in options if f"  {option}" not in done.stdout] == []


def test_asks_for_the_folder_of_the_images():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--data", "cifar100"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--data cifar100 needs --root" in done.stderr


@pytest.mark.parametrize("count", [2, 3, 5, 11, 12, 30])
def test_interval_is_students(report, count):
    ours = [90.0 + 0.37 * (i * i % 7) for i in range(count)]
    theirs = [89.0 + 0.21 * (i * i % 5) for i in range(count)]
    centre, low, high = report.interval(ours, theirs)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    exact = stats.t.interval(
        0.95, count - 1, loc=statistics.mean(differences), scale=stats.sem(differences)
    )
    assert centre == pytest.approx(statistics.mean(differences))
    assert (low, high) == pytest.approx(exact, rel=2e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("ours", "verdict"),
    [
        ([91.0, 91.1, 91.2], "letKD-1 is better"),
        ([80.0, 80.1, 80.2], "letKD-1 is worse"),
        ([89.0, 92.0, 90.0], "not separated"),
        ([90.5], "one seed shows nothing"),
    ],
)
def test_verdicts_follow_the_interval(report, ours, verdict):
    theirs = [90.0, 90.1, 90.1][: len(ours)]
    results = {
        "labels only": report.Result(theirs, [1.0], 10),
        "letKD-1": report.Result(ours, [1.0], 20),
    }
    assert verdict in report.closing(results)
