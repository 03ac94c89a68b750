"""Writing a record: batch by batch, and on from where an earlier call was stopped."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdlayers._records.files import (
    CHECKS,
    DESCRIPTION,
    Description,
    field_path,
    file_digest,
    parse,
    row_checks,
)
from kdlayers._records.views import draw, image_check
from kdlayers._utils.files import TEMPORARY, replacing
from kdlayers._utils.progress import shown
from kdlayers.errors import RecordError

PLAN, DONE = "unfinished.json", "unfinished.rows"

Run = Callable[[Tensor], Sequence[Tensor]]
"""From a batch of images to the tensors of the fields, in order."""


class _Rows(Dataset[tuple[Tensor, int]]):
    """The images of all rows in order, with their checks; what the workers load."""

    def __init__(self, dataset: Any, plan: Description, rows: range) -> None:
        self.dataset, self.plan, self.rows = dataset, plan, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        view, sample = divmod(self.rows[index], self.plan.samples)
        image = draw(self.dataset, self.plan.seed, sample, view)[0]
        return image, image_check(image)


def write_record(
    dataset: Any, path: Path, plan: Description, run: Run, *, num_workers: int, progress: bool
) -> None:
    """Write the record that ``plan`` describes; nothing happens if it is there already.

    Raises:
        RecordError: if the folder holds another record, or the disk is too small.
    """
    finished = path / DESCRIPTION
    if finished.exists():
        found = parse(finished.read_text("utf-8", errors="replace"), path)
        _need_same(replace(found, checks=""), plan, path)
        _tidy(path)
        return
    done = _prepare(path, plan)
    rows = range(done, plan.rows)
    loader = DataLoader(
        _Rows(dataset, plan, rows),
        batch_size=plan.batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # the user's default generator stays as it is
    )
    title = f"record, {plan.views} views of {plan.samples} samples, {_size(plan.total_bytes)}"
    with ExitStack() as stack:
        names = [field_path(path, i) for i in range(len(plan.fields))]
        files = [stack.enter_context(name.open("r+b")) for name in (*names, path / CHECKS)]
        for images, checks in shown(loader, title, progress):
            _write(files, plan, done, list(_arrays(run(images), plan)), checks)
            done += len(checks)
            (path / DONE).write_text(f"{done:020d}")
        for file in files:
            os.fsync(file.fileno())
    whole = replace(plan, checks=file_digest(path / CHECKS))
    _write_whole(finished, whole.to_json())
    _tidy(path)


def _tidy(path: Path) -> None:
    """Remove what only an unfinished record has; a killed call may have left it."""
    for name in (PLAN, DONE):
        (path / name).unlink(missing_ok=True)


def _collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, list[int]]:
    shapes = {tuple(image.shape) for image, _ in samples}
    if len(shapes) > 1:
        raise RecordError(
            f"the images of a batch have the shapes {sorted(shapes)}; a record needs a transform "
            "that gives all images one size, such as RandomResizedCrop or Resize and CenterCrop"
        )
    return torch.stack([image for image, _ in samples]), [check for _, check in samples]


def _arrays(tensors: Sequence[Tensor], plan: Description) -> Iterator[Any]:
    for tensor, field in zip(tensors, plan.fields, strict=True):
        if tuple(tensor.shape[1:]) != field.shape:
            raise RecordError(
                f"{field.name} of a batch has shape {tuple(tensor.shape[1:])}, but the first one "
                f"had {field.shape}: a record needs images of one size"
            )
        if not tensor.isfinite().all():
            raise RecordError(
                f"the teacher gave NaN or infinity as {field.name}; look at its input"
            )
        kept = tensor.to("cpu", getattr(torch, field.dtype)).contiguous()
        if not kept.isfinite().all():
            raise RecordError(
                f"{field.name} has values beyond the range of {field.dtype}; record with "
                "dtype='float32'"
            )
        yield kept.numpy()


def _write(
    files: Sequence[IO[bytes]],
    plan: Description,
    done: int,
    arrays: Sequence[Any],
    images: Sequence[int],
) -> None:
    checks = torch.tensor([images, row_checks(arrays)], dtype=torch.int32).T.contiguous().numpy()
    widths = [field.row_bytes for field in plan.fields]
    for file, array, width in zip(files, (*arrays, checks), (*widths, 8), strict=True):
        file.seek(done * width)
        file.write(array.tobytes())
        file.flush()


def _prepare(path: Path, plan: Description) -> int:
    """Make the folder and its files, or find how many rows an earlier call has written."""
    path.mkdir(parents=True, exist_ok=True)
    if (path / PLAN).exists():
        _need_same(parse((path / PLAN).read_text("utf-8", errors="replace"), path), plan, path)
        _allocate(path, plan)
        done = (path / DONE).read_text() if (path / DONE).exists() else "0"
        return int(done) if done.isdigit() else 0
    if any(not file.name.startswith(TEMPORARY) for file in path.iterdir()):
        raise RecordError(f"{path} is not empty and holds no record; pass a new folder")
    free = shutil.disk_usage(path).free
    if plan.total_bytes > free:
        raise RecordError(
            f"the record needs {_size(plan.total_bytes)}, but the disk of {path} has "
            f"{_size(free)} free; record fewer views, only what the losses need, or another dtype"
        )
    # The plan first: whatever a killed call leaves after it belongs to this record.
    _write_whole(path / PLAN, plan.to_json())
    _allocate(path, plan)
    return 0


def _allocate(path: Path, plan: Description) -> None:
    """Give every file its size; what is written already stays."""
    widths = [field.row_bytes for field in plan.fields]
    names = [field_path(path, i) for i in range(len(widths))]
    for file, width in zip((*names, path / CHECKS), (*widths, 8), strict=True):
        with file.open("ab") as found:
            found.truncate(width * plan.rows)


def _write_whole(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _need_same(found: Description, plan: Description, path: Path) -> None:
    names = ("samples", "views", "seed", "batch_size", "fields", "about")
    other = [name for name in names if getattr(found, name) != getattr(plan, name)]
    if other:
        name = other[0]
        raise RecordError(
            f"{path} holds a record with other settings: {name} is {getattr(found, name)!r} there "
            f"and {getattr(plan, name)!r} here; pass another folder, or delete this one"
        )


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
