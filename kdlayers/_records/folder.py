"""The folder of a record that is being written: its files, the free space, the finished batches.

``unfinished.json`` has the description while rows are missing. ``unfinished.batches`` has a byte
for each batch of the teachers, which is 1 once the batch is written. A call can therefore continue
from any point, with any number of processes.
"""

import shutil
from pathlib import Path

from kdlayers._records.files import CHECKS, Description, field_path, parse
from kdlayers._utils.files import TEMPORARY, replacing
from kdlayers.errors import RecordError

PLAN, DONE = "unfinished.json", "unfinished.batches"


def prepare(path: Path, plan: Description) -> None:
    """Make the folder and its files, or check those that an earlier call has left.

    Raises:
        RecordError: if the folder holds something else, or the disk is too small.
    """
    path.mkdir(parents=True, exist_ok=True)
    if (path / PLAN).exists():
        need_same(parse((path / PLAN).read_text("utf-8", errors="replace"), path), plan, path)
        _need_space(path, plan)
        _allocate(path, plan)
        return
    if any(not file.name.startswith(TEMPORARY) for file in path.iterdir()):
        raise RecordError(f"{path} is not empty and holds no record; pass a new folder")
    _need_space(path, plan)
    # Write the plan first, so that all files of an interrupted call belong to this record.
    write_whole(path / PLAN, plan.to_json())
    _allocate(path, plan)


def missing(path: Path, plan: Description) -> list[range]:
    """The rows of each batch that is not written yet."""
    done, size = _done(path, plan), plan.batch_size
    starts = range(0, plan.rows, size)
    return [
        range(start, min(start + size, plan.rows))
        for flag, start in zip(done, starts, strict=True)
        if flag != 1
    ]


def announce(path: Path, plan: Description) -> str:
    """One line with the size of the record and the free space."""
    left = sum(map(len, missing(path, plan)))
    rest = "" if left == plan.rows else f" ({size_text(left * plan.row_bytes)} still to write)"
    return (
        f"recording {plan.views} views of {plan.samples:,} samples in {path}: "
        f"{size_text(plan.total_bytes)}{rest}, {size_text(shutil.disk_usage(path).free)} free"
    )


def tidy(path: Path) -> None:
    """Remove the files that only an unfinished record has."""
    for name in (PLAN, DONE):
        (path / name).unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file in one step."""
    with replacing(path) as file:
        file.write(text.encode())


def need_same(found: Description, plan: Description, path: Path) -> None:
    """Check that a folder holds the record that is asked for.

    Raises:
        RecordError: if a setting differs.
    """
    names = ("samples", "views", "seed", "batch_size", "fields", "about")
    other = [name for name in names if getattr(found, name) != getattr(plan, name)]
    if other:
        name = other[0]
        raise RecordError(
            f"{path} holds a record with other settings: {name} is {getattr(found, name)!r} there "
            f"and {getattr(plan, name)!r} here; pass another folder, or delete this one"
        )


def _done(path: Path, plan: Description) -> bytes:
    found = (path / DONE).read_bytes() if (path / DONE).exists() else b""
    return found[: plan.batches].ljust(plan.batches, b"\0")


def _need_space(path: Path, plan: Description) -> None:
    free = shutil.disk_usage(path).free
    needed = sum(map(len, missing(path, plan))) * plan.row_bytes
    if needed > free:
        raise RecordError(
            f"the record needs {size_text(needed)}, but the disk of {path} has "
            f"{size_text(free)} free; record fewer views, only what the losses need, or another "
            "dtype"
        )


def _allocate(path: Path, plan: Description) -> None:
    """Give every file its size; what is written already stays."""
    sizes = {field_path(path, i): f.row_bytes * plan.rows for i, f in enumerate(plan.fields)}
    sizes |= {path / CHECKS: 8 * plan.rows, path / DONE: plan.batches}
    for file, size in sizes.items():
        with file.open("ab") as found:
            found.truncate(size)


def size_text(count: float) -> str:
    """A number of bytes as text, such as 3.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
