"""The quickstart runs end to end, and the numbers in its table are right."""

import math
import os
import re
import subprocess
import sys

import pytest
from PIL import Image
from scipy import stats

from kdlayers import load_student
from tests.examples import EXAMPLES

METHODS = ["labels only", "KD", "letKD-2", "letKD-2 + KD"]
ROW = re.compile(
    r"^(\S.*?) +([\d.]+) ± ([\d.]+) +([-+][\d.]+) \(([-+][\d.]+) to ([-+][\d.]+)\) +([\d,]+)$", re.M
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of a run in small, its output, and its rows by method."""
    folder = tmp_path_factory.mktemp("quickstart")
    output = run(folder)
    return folder, output, {row[0]: row[1:] for row in ROW.findall(output)}


def run(folder, *arguments):
    """The output of a quick run, which writes into ``folder``."""
    script = str(EXAMPLES / "quickstart.py")
    done = subprocess.run(
        [sys.executable, script, "--quick", "--out", str(folder), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_method_has_its_row(ran):
    _, output, rows = ran
    assert list(rows) == METHODS, output
    for mean, spread, *_ in rows.values():
        assert 0 <= float(mean) <= 100
        assert 0 <= float(spread) <= 50


def test_differences_are_those_of_the_means(ran):
    rows = {name: [float(cell) for cell in row[:5]] for name, row in ran[2].items()}
    assert rows["labels only"][2:] == [0, 0, 0]
    for mean, _, above, low, high in rows.values():
        assert above == pytest.approx(mean - rows["labels only"][0], abs=0.011)
        assert above == pytest.approx((low + high) / 2, abs=0.011)


def test_the_interval_is_students():
    import quickstart

    exact = stats.t.ppf(0.975, len(quickstart.SEEDS) - 1)
    assert math.isclose(quickstart.T95, exact, abs_tol=1e-3)


def test_layers_cost_parameters(ran):
    counts = {name: int(row[-1].replace(",", "")) for name, row in ran[2].items()}
    assert counts["labels only"] == counts["KD"]
    assert counts["letKD-2"] == counts["letKD-2 + KD"]
    # 64 templates on 64 channels, and 20 (two for each class) on 48: 2KC + 2K + 2.
    last, first = 2 * 64 * 64 + 2 * 64 + 2, 2 * 20 * 48 + 2 * 20 + 2
    assert counts["letKD-2"] - counts["KD"] == last + first


def test_the_saved_student_predicts_the_same(ran):
    import argparse

    import data
    import quickstart

    folder, output, _ = ran
    student = load_student(quickstart.network(16, 10), folder / "student.pt")
    args = argparse.Namespace(data=None, quick=True, epochs=1, out=folder)
    test = data.load(args).test
    said = re.search(r"^the last student, ([\d.]+) %: .*student\.pt$", output, re.M)
    assert float(said[1]) == pytest.approx(quickstart.accuracy(student, test), abs=0.01)


def test_it_takes_a_folder_of_images(tmp_path):
    for part, number in (("train", 8), ("val", 2)):
        for label, colour in enumerate(("red", "green", "blue")):
            (tmp_path / part / colour).mkdir(parents=True)
            for index in range(number):
                picture = Image.new("RGB", (16, 16), tuple(200 * (c == label) for c in range(3)))
                picture.save(tmp_path / part / colour / f"{index}.png")
    output = run(tmp_path / "out", "--data", str(tmp_path))
    assert [row[0] for row in ROW.findall(output)] == METHODS
