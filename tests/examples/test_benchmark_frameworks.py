"""The benchmark of frameworks: a script's rows, and the table that it is shown in."""

import json

import pytest

from tests.benchmark_modules import FOLDER, load
from tests.examples.test_benchmarks import run


def test_the_rows_of_a_script(tmp_path):
    pytest.importorskip("timm.task")
    report = run(tmp_path, "frameworks", "--only", "timm train.py", "--rounds", "2")
    variants = ["as it is", "KDLoss", "KDLoss, letKD-1", "its own distillation"]
    assert list(report["times_ms"]["timm train.py"]) == variants
    ratios = {(c["ours"], c["alternative"]): c["ratio"]["middle"] for c in report["comparisons"]}
    assert ("KDLoss", "its own distillation") in ratios
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_page_has_a_row_for_every_script_that_was_measured():
    page = load("frameworks_page")
    docs = FOLDER.parents[1] / "docs"
    report = json.loads((docs / "data" / "frameworks" / "frameworks.json").read_text())
    measured = {comparison["case"] for comparison in report["comparisons"]}
    assert {case for *_, case in page.SCRIPTS} == measured
    assert page.table(docs) in (docs / "frameworks.md").read_text("utf-8")
