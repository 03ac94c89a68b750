"""README's code runs, its commands are those that CI runs, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

from tests.docs_blocks import run_page, small_codebooks

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore:the optimiser changed the student")
def test_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small_codebooks(monkeypatch)
    assert run_page(README.read_text("utf-8"), str(README)) >= 1


def test_the_first_code_is_above_the_fold():
    lines = README.read_text("utf-8").splitlines()
    assert lines.index("```python") < 12
    assert sum("# " in line for line in lines[: lines.index("```", 12)] if "kd" in line) >= 3


@pytest.mark.parametrize("name", ["quickstart", "tests"])
def test_ci_takes_its_commands_from_here(name):
    text = README.read_text("utf-8")
    assert re.search(rf"<!-- ci: {name} -->\n```bash\npip install .* && python .*\n```", text)
    assert f"readme {name}" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_tasks_run_what_ci_runs():
    ci, tasks = ((ROOT / name).read_text("utf-8") for name in (".ci/run", "noxfile.py"))
    for command in (".ci/lint", ".ci/docs"):
        assert command in ci
        assert f'"{command}"' in tasks
    assert '".ci/run"' in tasks


def test_links_resolve():
    pages = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
    for page in pages:
        text = page.read_text("utf-8")
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_anchors_exist():
    for page in [README, *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text("utf-8")
        for target, anchor in re.findall(r"\]\(([^)#:]+?)#([^)]+)\)", text):
            headings = re.findall(r"^#+ (.*)$", (page.parent / target).read_text("utf-8"), re.M)
            assert anchor in [slug(h) for h in headings], f"{page.name}: {target}#{anchor}"


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
