"""The benchmark of the fit runs on a small problem and saves its results."""

import json
import os
import subprocess
import sys

import pytest

from tests.examples import EXAMPLES

SCRIPT = EXAMPLES / "benchmarks" / "fit.py"


@pytest.mark.slow
def test_quick_run_compares_all_contenders(tmp_path):
    pytest.importorskip("faiss")
    command = [sys.executable, str(SCRIPT), "--quick", "--rounds", "1", "--threads", "1"]
    command += ["--out", str(tmp_path / "out"), "--rows", str(tmp_path / "rows")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "fit.json").read_text())
    clusters, analyses = found["tables"]
    assert [row[0].split(" (")[0] for row in clusters["rows"]] == [
        "kdlayers",
        "faiss, 256 rows a centre",
        "faiss, all rows",
        "faiss, all rows, until equal",
        "scikit-learn MiniBatchKMeans",
    ]
    assert all(float(row[5]) > 0.95 for row in clusters["rows"])
    assert len(analyses["rows"]) == 2
    assert (tmp_path / "out" / "fit.md").read_text().startswith("# Learning templates")
