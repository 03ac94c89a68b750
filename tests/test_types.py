"""Types for users: strict pyright on code that uses the package, and no unknown types.

Inside the package mypy and pyright are run by ``.ci/lint``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyright")

ROOT = Path(__file__).parents[1]
INSTALLED = "KDLAYERS_WHEEL" in os.environ


def pyright(*arguments, cwd):
    """What pyright says, as JSON; its first run downloads it from the npm registry."""
    command = [sys.executable, "-m", "pyright", "--outputjson", *arguments]
    # It looks for packages in the environment that is first on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PATH": path},
        check=False,
    )
    if done.returncode not in (0, 1) and not INSTALLED:
        pytest.skip(f"pyright could not run: {done.stderr.strip()[-200:]}")
    return json.loads(done.stdout)


def test_strict_code_of_a_user_has_no_errors():
    said = pyright("--pythonpath", sys.executable, "tests/types/sample_user.py", cwd=ROOT)
    assert said["summary"]["filesAnalyzed"] == 1
    found = said["generalDiagnostics"]
    assert [f"{d['range']['start']['line'] + 1}: {d['message']}" for d in found] == []


@pytest.mark.skipif(not INSTALLED, reason="pyright does not look into editable installations")
def test_no_public_name_has_an_unknown_type(tmp_path):
    said = pyright("--verifytypes", "kdlayers", "--ignoreexternal", cwd=tmp_path)
    counts = said["typeCompleteness"]["exportedSymbolCounts"]
    assert counts["withKnownType"] > 100
    unknown = [
        symbol["name"]
        for symbol in said["typeCompleteness"]["symbols"]
        if symbol["isExported"] and not symbol["isTypeKnown"] and not symbol["isTypeAmbiguous"]
    ]
    # The base classes of these two are found at run time, in the framework that is installed.
    base_unknown = ["integrations.lightning.KDCallback", "integrations.transformers.KDTrainer"]
    assert sorted(unknown) == [f"kdlayers.{name}" for name in base_unknown]
