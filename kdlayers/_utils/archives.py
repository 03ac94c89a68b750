"""Files of torch.save: written atomically, and checked for damage before they are read."""

import os
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kdlayers._utils.files import replacing
from kdlayers.errors import CheckpointError


def write_archive(content: Any, path: str | os.PathLike[str] | BinaryIO) -> None:
    """Write ``content`` with torch.save: atomically to a path, or into a file object.

    Raises:
        OSError: if the file cannot be written; an existing file is then unchanged.
    """
    wanted = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)  # read_archive compares them
    try:
        with replacing(path) if isinstance(path, (str, os.PathLike)) else nullcontext(path) as file:
            torch.save(content, file)
    finally:
        torch.serialization.set_crc32_options(wanted)


FROM_CHECKPOINT = (
    "Attach the KD layers as for training, load its weights with model.load_state_dict(checkpoint["
    "'state_dict_ema']) (or 'state_dict', 'model_ema', 'model'), then call save_student(model, "
    "path). A timm checkpoint is read by `with torch.serialization.safe_globals(["
    "argparse.Namespace]): checkpoint = torch.load(path, weights_only=True)`"
)
"""Advice for messages: how to make a student's file from a training checkpoint."""


def read_archive(path: str | os.PathLike[str] | BinaryIO) -> tuple[Any, str]:
    """The content of a file of `write_archive`, on the CPU, and the file's name for messages.

    Reads no code. Compares the archive's checksums, which ``torch.load`` alone does not.

    Raises:
        CheckpointError: if the file is damaged, or not one that ``torch.save`` wrote.
        OSError: if it cannot be opened, such as FileNotFoundError.
    """
    if not isinstance(path, (str, os.PathLike)):
        return _read(path, "the file"), "the file"
    with Path(path).open("rb") as file:
        return _read(file, str(path)), str(path)


def _read(file: BinaryIO, label: str) -> Any:
    try:
        stored = _check_archive(file)
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # neither zipfile nor torch.load has one exception for damage
        if isinstance(error, UnpicklingError) and "GLOBAL" in str(error):
            raise CheckpointError(
                f"{label} could not be read: it holds more than tensors and plain values, which "
                "could run code, as a training script's checkpoint does; it is not a file of "
                f"save_student. {FROM_CHECKPOINT}"
            ) from error
        raise CheckpointError(
            f"{label} could not be read: it is damaged, incomplete, or not written by torch.save "
            f"({_first_line(error)}); take another copy of the file"
        ) from error
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_in(content)}
    declared = Counter(storage.nbytes() for storage in storages.values() if storage.nbytes())
    if declared - stored:
        size = max(declared - stored)
        raise CheckpointError(
            f"{label} is damaged: a tensor declares {size} bytes, which are not stored in the file"
        )
    return content


def _check_archive(file: BinaryIO) -> Counter[int]:
    """Compare all checksums; returns how often data of each size in bytes is stored."""
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("entries are compressed, which torch.save does not do")
        stored = sum(entry.file_size for entry in entries)
        if stored > size:
            raise CheckpointError(f"entries declare {stored} bytes, but the file has {size}")
        bad = archive.testzip()
    if bad is not None:
        raise CheckpointError(f"the checksum of its entry {bad!r} is wrong")
    return Counter(entry.file_size for entry in entries if "/data/" in entry.filename)


def tensors_in(content: Any) -> list[Tensor]:
    """All tensors with values, also inside containers; each container is visited once."""
    found: list[Tensor] = []
    seen: set[int] = set()
    stack = [content]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            if item.layout is torch.strided and not item.is_meta:
                found.append(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
    return found


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:200]
