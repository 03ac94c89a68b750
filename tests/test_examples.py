"""The examples of one method run, print finite numbers, and stay short."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d+\.\d+(?:e[-+]?\d+)?|nan|inf)\b", re.IGNORECASE)

# What each prints: the rows of accuracies, and terms that it logs in every epoch.
PRINTED = {
    "iekd": (["labels only", "IE-KD"], ["IE-KD", "IE-KD.inheritance", "IE-KD.exploration"]),
    "skd": (["labels only", "student-friendly KD"], ["SKD", "SKD.entropy", "SKD.agreement"]),
    "aekt": (["labels only", "AEKT"], ["AEKT", "AEKT.target", "AEKT.others", "AEKT.adaptive"]),
    "combine": (["labels only", "all together"], ["AEKTLoss", "SKD", "SKD.teacher_kl", "total"]),
    "mutual": (
        [f"{name}, seed {seed}" for name in ("labels only", "DML", "IE-DML") for seed in (0, 1)],
        ["MutualLoss", "total"],  # of DML; IE-DML adds its own
    ),
}


@pytest.fixture(scope="module", params=PRINTED)
def run(request, tmp_path_factory):
    """Name and output of an example, run in a folder of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            str(EXAMPLES / f"{request.param}.py"),
            "--quick",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp(request.param),
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return request.param, done.stdout


def test_accuracies_are_printed(run):
    name, output = run
    for row in PRINTED[name][0]:
        found = re.search(rf"^{re.escape(row)} +(\d+\.\d\d) %$", output, re.M)
        assert found is not None, f"{row} in {output}"
        assert 0 <= float(found[1]) <= 100


def test_every_term_is_logged_and_finite(run):
    name, output = run
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert len(lines) == (4 if name == "mutual" else 2)
    for line in lines:
        terms = line.split(": ", 1)[1].split(", ")
        values = dict(term.rsplit(" ", 1) for term in terms)
        assert set(PRINTED[name][1]) <= set(values), line
        assert all(math.isfinite(float(value)) for value in values.values()), line
    assert all(math.isfinite(float(number)) for number in NUMBER.findall(output))


@pytest.mark.parametrize("name", PRINTED)
def test_they_are_short(name):
    lines = (EXAMPLES / f"{name}.py").read_text("utf-8").splitlines()
    assert len(lines) <= 80
    assert any("kd.loss(y)" in line for line in lines)
