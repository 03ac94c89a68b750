"""The changed lines that the pages show, counted, and applied to loops of the scripts' shape."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
LOOPS = Path(__file__).parent / "loops"


def diffs(page):
    """The diff blocks of a page, by the script that the line before each names."""
    text = (DOCS / page).read_text("utf-8")
    found = re.findall(r"^<!-- (\S+) -->\n```diff\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len({name for name, _ in found}) == len(found)
    return dict(found)


def changed_lines(diff):
    """How many lines of the result are not the script's."""
    return sum(line.startswith("+") for line in diff.splitlines())


def hunks(diff):
    """Lists of lines between the lines ``...``."""
    parts = [[]]
    for line in diff.splitlines():
        if line.strip() == "...":
            parts.append([])
        elif line.strip():
            parts[-1].append((line[0], line[1:]))
    return [part for part in parts if part]


def patched(source, diff):
    """``source`` with every hunk applied; lines without context go behind the docstring."""
    lines = source.splitlines()
    for hunk in hunks(diff):
        old = [text.strip() for sign, text in hunk if sign != "+"]
        if not old:
            start, shift = 1, 0
        else:
            ends = len(lines) - len(old) + 1
            places = [i for i in range(ends) if [t.strip() for t in lines[i : i + len(old)]] == old]
            assert len(places) == 1, f"{old} stands {len(places)} times in the loop"
            start = places[0]
            first = next(text for sign, text in hunk if sign != "+")
            shift = indent(lines[start]) - indent(first)
        new, kept = [], iter(lines[start : start + len(old)])
        for sign, text in hunk:
            if sign == "+":
                new.append(" " * max(indent(text) + shift, 0) + text.strip())
            else:
                own = next(kept)
                new += [own] if sign == " " else []
        lines[start : start + len(old)] = new
    return "\n".join(lines) + "\n"


def indent(line):
    return len(line) - len(line.lstrip())


def loop(name, diff=None, **names):
    """The ``main`` of a loop, with the page's lines if a diff is given, and some names replaced."""
    source = (LOOPS / f"{name}.py").read_text("utf-8")
    code = source if diff is None else patched(source, diff)
    space = {"__name__": name}
    exec(compile(code, f"{name}.py", "exec"), space)
    space.update(names)
    return space["main"]
