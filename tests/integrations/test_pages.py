"""The pages' lines are few, and the table of frameworks.md has their number."""

import re

import pytest

from tests.integrations.pages import DOCS, changed_lines, diffs, patched

PAGES = ("timm-train.md", "torchvision.md", "accelerate.md", "hf-trainer.md", "lightning.md")
ALL = {name: diff for page in PAGES for name, diff in diffs(page).items()}


def test_every_script_has_its_lines():
    assert len(ALL) == 8


@pytest.mark.parametrize("name", ALL)
def test_at_most_eight_lines(name):
    assert 0 < changed_lines(ALL[name]) <= 8


@pytest.mark.parametrize("name", ALL)
def test_no_line_is_longer_than_the_scripts_own(name):
    assert max(map(len, ALL[name].splitlines())) <= 122


def test_the_table_has_these_numbers():
    text = (DOCS / "frameworks.md").read_text("utf-8")
    rows = re.findall(r"^\| .*?<!-- (\w+) --> \| (\d+) \|", text, re.MULTILINE)
    assert {name: int(number) for name, number in rows} == {
        name: changed_lines(diff) for name, diff in ALL.items()
    }


SOURCE = '"""Doc."""\n\ndef f(x):\n    y = x\n    return y\n'


def test_a_diff_is_applied_where_its_context_stands():
    diff = "+import math\n...\n-    y = x\n+    y = math.floor(x)\n     return y\n"
    space = {}
    exec(patched(SOURCE, diff), space)
    assert space["f"](1.5) == 1
    with pytest.raises(AssertionError, match="stands 0 times"):
        patched(SOURCE, "     z = x\n+    z += 1\n")
