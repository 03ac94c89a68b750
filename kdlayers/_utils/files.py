"""Atomic writes: after a crash the old file or the new file exists, never a part of one."""

import contextlib
import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".kdlayers-"
"""Prefix of temporary files; a killed process may leave one."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[BinaryIO, None, None]:
    """A new file, open for writing, that replaces ``path`` at the end of the block.

    The data goes to ``.kdlayers-*.tmp`` in the same folder, is flushed to the disk, and is then
    renamed, which the operating system does in one step. After an error, a full disk or a killed
    process, ``path`` is unchanged; only a killed process leaves its temporary file. If there are
    several writers, the last one to finish wins. Links are followed, and an existing file keeps its
    mode. Devices and pipes cannot be replaced and are written directly.

    Raises:
        OSError: if the file cannot be written, even if the block raised another error for this.
    """
    target = Path(path).resolve()
    found = target.stat() if target.exists() else None
    if found is not None and not stat.S_ISREG(found.st_mode):
        with target.open("wb") as file:
            yield file
        return
    if found is not None and not os.access(target, os.W_OK):
        raise PermissionError(f"{path} is write-protected")
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            watched = _Watched(file)
            try:
                yield watched  # type: ignore[misc]  # what torch.save needs of a file
            except Exception as error:
                if watched.failure is None:
                    raise
                raise watched.failure from error
            file.flush()
            os.fsync(file.fileno())
        if found is not None:
            temporary.chmod(stat.S_IMODE(found.st_mode))
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


class _Watched:
    """A file that remembers why a write failed: torch.save reports only that it did."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        """Write all of ``data``."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        """Pass all data to the operating system."""
        self._file.flush()


def _flush_folder(folder: Path) -> None:
    """Make the new name survive a power failure, on systems where folders can be opened."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
