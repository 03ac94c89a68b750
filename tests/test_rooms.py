"""The rooms of the package: which may import which."""

import ast
from pathlib import Path

import pytest

import kdlayers

PACKAGE = Path(kdlayers.__file__).parent
# From the ground up: a room imports only those before it.
ROOMS = (
    "errors",
    "_utils",
    "_models",
    "functional",
    "schedules",
    "_layer",
    "_targets",
    "losses",
    "_records",
    "_step",
    "_attaching",
    "_leaving",
    "viz",
    "integrations",
)
NOT_ALLOWED = {
    "_leaving": {"_attaching"},
    "viz": {"_attaching", "_leaving"},
    "integrations": {"viz"},
}


def room_of(path: Path) -> str:
    """The folder below the package, or the name of a file that lies at its root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms named by any import statement of the file, inside functions too."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            whole = [alias.name for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in whole if name.startswith("kdlayers.")}
    return rooms


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_file_is_in_a_known_room():
    assert {room_of(path) for path in FILES} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_the_rooms_below_its_own(path):
    room = room_of(path)
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) - NOT_ALLOWED.get(room, set())
    assert imported_rooms(path) <= allowed


@pytest.mark.parametrize("room", [room for room in ROOMS if (PACKAGE / room).is_dir()])
def test_every_room_documents_its_content(room):
    assert ast.get_docstring(ast.parse((PACKAGE / room / "__init__.py").read_text()))
