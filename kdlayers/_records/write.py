"""Writes a record batch by batch, with one process or several, and continues a stopped call."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdlayers._records.files import (
    CHECKS,
    DESCRIPTION,
    Description,
    field_path,
    file_digest,
    parse,
    row_checks,
)
from kdlayers._records.folder import (
    DONE,
    announce,
    missing,
    need_same,
    prepare,
    size_text,
    tidy,
    write_whole,
)
from kdlayers._records.views import draw, image_check
from kdlayers._utils.distributed import everywhere, rank, together, world_size
from kdlayers._utils.progress import shown
from kdlayers.errors import RecordError

Run = Callable[[Tensor], Sequence[Tensor]]
"""Maps a batch of images to the tensors of the fields, in order."""


class _Rows(Dataset[tuple[Tensor, int]]):
    """The images of all rows, with their checksums, for the workers of a loader."""

    def __init__(self, dataset: Any, plan: Description) -> None:
        self.dataset, self.plan = dataset, plan

    def __len__(self) -> int:
        return self.plan.rows

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        view, sample = divmod(row, self.plan.samples)
        image = draw(self.dataset, self.plan.seed, sample, view)[0]
        return image, image_check(image)


class _Batches(Sampler[list[int]]):
    """The rows of each batch, for the loader."""

    def __init__(self, batches: Sequence[range]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)


def write_record(
    dataset: Any, path: Path, plan: Description, run: Run, *, num_workers: int, progress: bool
) -> None:
    """Write the record that ``plan`` describes, unless it is finished already.

    Under ``torch.distributed`` every rank calls this, and writes its part of the batches. A batch
    has the same rows however many ranks there are, hence the same bytes.

    Raises:
        RecordError: if the folder holds another record, the disk is too small, the ranks ask for
            different records, or another rank failed.
    """
    first = rank() == 0
    asked = everywhere(plan.to_json())
    for index, other in enumerate(asked):
        if other != asked[0]:
            raise RecordError(
                f"rank {index} calls kd.record with another data set, teacher or settings than "
                "rank 0; call it in the same way on every rank"
            )
    together(lambda: _start(path, plan, progress=progress) if first else None)
    if not (path / DESCRIPTION).exists():
        together(lambda: _write_part(dataset, path, plan, run, num_workers, progress and first))
        together(lambda: _finish(path, plan) if first else None)


def _start(path: Path, plan: Description, *, progress: bool) -> None:
    if (path / DESCRIPTION).exists():
        found = parse((path / DESCRIPTION).read_text("utf-8", errors="replace"), path)
        need_same(replace(found, checks=""), plan, path)
        tidy(path)
        return
    prepare(path, plan)
    if progress:
        sys.stderr.write(f"{announce(path, plan)}\n")


def _write_part(
    dataset: Any, path: Path, plan: Description, run: Run, num_workers: int, progress: bool
) -> None:
    """Write this rank's batches of those that are missing."""
    batches = together(lambda: missing(path, plan))[rank() :: world_size()]
    loader = DataLoader(
        _Rows(dataset, plan),
        batch_sampler=_Batches(batches),
        num_workers=num_workers,
        collate_fn=_collate,
        generator=torch.Generator(),  # leaves the user's default generator unchanged
    )
    title = f"record, {plan.views} views of {plan.samples} samples, {size_text(plan.total_bytes)}"
    with ExitStack() as stack:
        names = [field_path(path, i) for i in range(len(plan.fields))]
        names += [path / CHECKS, path / DONE]
        files = [stack.enter_context(name.open("r+b")) for name in names]
        with torch.device("cpu"):  # whatever the default device, for the workers and their seed
            loaded = iter(loader)
        for rows, (images, checks) in zip(shown(batches, title, progress), loaded, strict=True):
            _write(files, plan, rows, list(_arrays(run(images), plan)), checks)
        for file in files:
            os.fsync(file.fileno())


def _finish(path: Path, plan: Description) -> None:
    """Write the description, which completes the record."""
    whole = replace(plan, checks=file_digest(path / CHECKS))
    write_whole(path / DESCRIPTION, whole.to_json())
    tidy(path)


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
            raise RecordError(f"the teacher gave NaN or infinity as {field.name}; check its input")
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
    rows: range,
    arrays: Sequence[Any],
    images: Sequence[int],
) -> None:
    both = [images, row_checks(arrays)]
    checks = torch.tensor(both, dtype=torch.int32, device="cpu").T.contiguous().numpy()
    widths = [*(field.row_bytes for field in plan.fields), 8]
    for file, array, width in zip(files, (*arrays, checks), widths, strict=False):
        _write_at(file, rows.start * width, array.tobytes())
    _write_at(files[-1], rows.start // plan.batch_size, b"\1")


def _write_at(file: IO[bytes], place: int, data: bytes) -> None:
    file.seek(place)
    file.write(data)
    file.flush()
