"""The files of a record: a JSON description, a raw array for each field, checks for each row.

A row holds the teachers' outputs for one view of one sample. Row ``view * samples + sample`` of
``checks.bin`` holds two CRC-32 numbers: of the image that the teachers saw, and of the row's own
bytes in all fields. The description is written last, so a folder without one is unfinished.
"""

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlayers._records.views import signed
from kdlayers.errors import RecordError

FORMAT, VERSION = "kdlayers record", 2
DESCRIPTION, CHECKS = "record.json", "checks.bin"
DTYPES = {"float16": 2, "float32": 4, "int32": 4}


@dataclass(frozen=True)
class Field:
    """One tensor of every row: its name, its shape without the batch, its dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return prod(self.shape) * DTYPES[self.dtype]


@dataclass(frozen=True)
class Description:
    """What a record holds and where it comes from; equal descriptions give equal bytes."""

    samples: int
    views: int
    seed: int
    batch_size: int
    fields: tuple[Field, ...]
    about: dict[str, Any]
    """The teachers, their taps and the data set, as JSON values."""
    checks: str = ""
    """SHA-256 of ``checks.bin``; empty while the record is unfinished."""

    @property
    def rows(self) -> int:
        """Number of rows: one for each view of each sample."""
        return self.samples * self.views

    @property
    def batches(self) -> int:
        """Number of the teachers' batches; the last one may be smaller."""
        return -(-self.rows // self.batch_size)

    @property
    def total_bytes(self) -> int:
        """Size of the finished record, without the description."""
        return self.rows * self.row_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in all files: the fields, and 8 of checksums."""
        return sum(field.row_bytes for field in self.fields) + 8

    @property
    def tag(self) -> int:
        """A 63-bit number that keys carry, so that a key of another record is noticed."""
        digest = sha256(self.to_json().encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def to_json(self) -> str:
        """The description as text, with a checksum of itself."""
        body = {"format": FORMAT, "version": VERSION, **asdict(self)}
        text = json.dumps(body, sort_keys=True)
        return json.dumps({**json.loads(text), "sha256": _digest(text)}, indent=1, sort_keys=True)


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def parse(text: str, path: Path) -> Description:
    """The description that `Description.to_json` wrote.

    Raises:
        RecordError: if the text is damaged or of an unknown version.
    """
    try:
        body = json.loads(text)
        stated = body.pop("sha256")
        known = (body.pop("format"), body.pop("version"))
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise _damaged(path, f"its description cannot be read ({error})") from error
    if known != (FORMAT, VERSION):
        raise RecordError(
            f"{path} has format {known[0]!r}, version {known[1]!r}; this kdlayers reads "
            f"{FORMAT!r}, version {VERSION}: record again"
        )
    whole = json.dumps({"format": FORMAT, "version": VERSION, **body}, sort_keys=True)
    if _digest(whole) != stated:
        raise _damaged(path, "its description was changed")
    fields = tuple(Field(f["name"], tuple(f["shape"]), f["dtype"]) for f in body.pop("fields"))
    return Description(fields=fields, **body)


def _damaged(path: Path, what: str) -> RecordError:
    return RecordError(
        f"the record {path} is damaged: {what}; delete the folder and call kd.record(...) again"
    )


def field_path(path: Path, index: int) -> Path:
    """File of the field of this index."""
    return path / f"field{index}.bin"


def row_checks(arrays: Sequence[Any]) -> list[int]:
    """CRC-32 of each row, over all fields in order."""
    checks = [0] * len(arrays[0])
    for array in arrays:
        checks = [zlib.crc32(row, check) for row, check in zip(array, checks, strict=True)]
    return [signed(check) for check in checks]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    total = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total.update(piece)
    return total.hexdigest()


class Reader:
    """A finished record, memory-mapped; every row is checked as it is read.

    Raises:
        RecordError: if the record is unfinished, damaged or truncated.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        import numpy as np  # torchvision brings it along; importing kdlayers stays light

        self.path = Path(path)
        if not (self.path / DESCRIPTION).exists():
            raise RecordError(
                f"{self.path} holds no finished record; call kd.record(dataset, path) to make it, "
                "or again to complete one that was stopped"
            )
        text = (self.path / DESCRIPTION).read_text("utf-8", errors="replace")
        self.description = parse(text, self.path)
        self.tag = self.description.tag
        for index, field in enumerate(self.description.fields):
            self._check_size(field_path(self.path, index), field.row_bytes)
        self._check_size(self.path / CHECKS, 8)
        if file_digest(self.path / CHECKS) != self.description.checks:
            raise _damaged(self.path, f"{CHECKS} was changed")
        rows = self.description.rows
        self._arrays = [
            np.memmap(field_path(self.path, i), f.dtype, "r", shape=(rows, *f.shape))
            for i, f in enumerate(self.description.fields)
        ]
        checks = np.fromfile(self.path / CHECKS, "<i4").reshape(rows, 2)
        self.image_checks = torch.from_numpy(checks[:, 0].copy())
        self._row_checks = checks[:, 1].copy()
        self.check_inputs = True
        """Whether images that the student gets are compared with the recorded ones."""
        self.watching = self.description.views > 1
        """Whether to look for repeated views: until `set_epoch` is called or a warning is given."""
        self.first_rows: list[int] = []
        """The rows of the first batch that was read in training."""
        self.moved_on = False
        """Whether another batch was read since."""

    def _check_size(self, file: Path, row_bytes: int) -> None:
        size = file.stat().st_size if file.exists() else -1
        if size != row_bytes * self.description.rows:
            found = "is missing" if size < 0 else f"has {size} bytes"
            wanted = row_bytes * self.description.rows
            raise _damaged(self.path, f"{file.name} {found} instead of {wanted} bytes")

    def read(self, rows: Sequence[int]) -> Mapping[str, Tensor]:
        """The fields of these rows, by name.

        Raises:
            RecordError: if the bytes of a row are not those that were written.
        """
        arrays = [array[rows] for array in self._arrays]
        wrong = [
            row
            for row, check in zip(rows, row_checks(arrays), strict=True)
            if check != self._row_checks[row]
        ]
        if wrong:
            samples = self.description.samples
            raise _damaged(
                self.path, f"view {wrong[0] // samples} of sample {wrong[0] % samples} was changed"
            )
        names = [field.name for field in self.description.fields]
        return {n: torch.from_numpy(a) for n, a in zip(names, arrays, strict=True)}
