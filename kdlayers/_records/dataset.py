"""The data set of a record: every sample in the view that the teacher saw, with its key."""

import re
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kdlayers._records.files import Reader
from kdlayers._records.views import draw, image_check, view_at
from kdlayers._utils.warn import warn
from kdlayers.errors import ArgumentError, RecordError

_OPEN: WeakValueDictionary[int, Reader] = WeakValueDictionary()


class RecordedDataset(Dataset[tuple[Any, ...]]):
    """A data set whose augmentation repeats the views that the teachers saw.

    Made by :meth:`kdlayers.KDHandle.record` and :func:`kdlayers.open_record`. Sample ``i`` is
    ``(image, label, key)``: what the user's data set returns for one of the recorded views, and a
    tensor that names the view. Give ``key`` to ``kd.loss(y, recorded=key)``. Every image is
    compared with a checksum of the one that was recorded.

    Call :meth:`set_epoch` at the start of each epoch. ``views`` epochs show each view of each
    sample once. Without it every epoch shows the same views, and ``kd.loss`` warns.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.data import TensorDataset
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDLoss, attach_kd
        >>> student, teacher = resnet18(num_classes=10), resnet18(num_classes=10)
        >>> data = TensorDataset(torch.randn(4, 3, 64, 64), torch.arange(4))
        >>> kd = attach_kd(student, teacher, losses=[KDLoss()])
        >>> with TemporaryDirectory() as folder:
        ...     x, y, key = next(iter(torch.utils.data.DataLoader(
        ...         kd.record(data, folder, views=1), batch_size=4)))
        ...     loss = torch.nn.functional.cross_entropy(student(x), y)
        ...     loss = loss + kd.loss(y, recorded=key)
    """

    def __init__(self, dataset: Any, reader: Reader) -> None:
        self.dataset = dataset
        plan = reader.description
        self.samples, self.views, self.seed, self.tag = (
            plan.samples,
            plan.views,
            plan.seed,
            reader.tag,
        )
        # Shared memory: persistent workers see the epoch that the main process sets.
        self._epoch = torch.zeros((), dtype=torch.int64, device="cpu").share_memory_()
        self._checks = reader.image_checks.share_memory_()
        self._reader: Reader | None = reader

    def __getstate__(self) -> dict[str, Any]:
        """Worker processes draw images; they do not read the record."""
        return {**self.__dict__, "_reader": None}

    def __copy__(self) -> "RecordedDataset":
        copied = RecordedDataset(self.dataset, self.reader)
        copied._epoch = self._epoch
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> "RecordedDataset":
        copied = RecordedDataset(deepcopy(self.dataset, memo), self.reader)
        copied._epoch.fill_(self._epoch)  # the tensor's own copy would not be in shared memory
        return copied

    def set_epoch(self, epoch: int) -> None:
        """Choose the views of this epoch.

        Args:
            epoch: number of the epoch, 0 or more.

        Raises:
            ArgumentError: if ``epoch`` is not such a number.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise ArgumentError(
                f"set_epoch takes the number of the epoch, 0 or more, got {epoch!r}"
            )
        self._epoch.fill_(epoch)
        if self._reader is not None:
            self._reader.watching = False

    @property
    def reader(self) -> Reader:
        """The open record."""
        if self._reader is None:
            raise RecordError("a worker process draws images, and does not read the record")
        return self._reader

    @property
    def check_inputs(self) -> bool:
        """Whether ``kd.loss`` compares images of the batch with the recorded ones; default True.

        Set it to False if your loop changes the images in a way that the teacher should not see.
        """
        return self._reader is None or self._reader.check_inputs

    @check_inputs.setter
    def check_inputs(self, value: bool) -> None:
        self.reader.check_inputs = value

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        sample = range(self.samples)[index]
        view = view_at(sample, int(self._epoch), self.views)
        row = view * self.samples + sample
        items = draw(self.dataset, self.seed, sample, view)
        if image_check(items[0]) != int(self._checks[row]):
            raise RecordError(
                f"view {view} of sample {sample} is not the image that the teacher saw: the data "
                "set, its transform, or the library of the transform has changed since the record "
                "was made; use the data set as it was, or call kd.record(...) into a new folder"
            )
        return (*items, torch.tensor([self.tag, row], device="cpu"))


def open_record(path: str | PathLike[str], dataset: Any) -> RecordedDataset:
    """Open a record that :meth:`kdlayers.KDHandle.record` has written.

    Args:
        path: the folder.
        dataset: the data set that was recorded, with the same transform. Its length, its
            transform's description and a few of its samples are compared with the record.

    Returns:
        A data set of ``(image, label, key)``.

    Raises:
        RecordError: if the record is damaged or unfinished, or of another data set.
    """
    return from_reader(Reader(Path(path)), dataset)


def from_reader(reader: Reader, dataset: Any) -> RecordedDataset:
    """The data set of an open record, after comparing ``dataset`` with it."""
    plan = reader.description
    if len(dataset) != plan.samples:
        raise RecordError(
            f"the record {reader.path} is of {plan.samples} samples, but the data set has "
            f"{len(dataset)}; pass the data set that was recorded"
        )
    found, stated = transform_of(dataset), plan.about.get("transform")
    if found != stated:
        raise RecordError(
            f"the record {reader.path} was made with the transform {stated}, but the data set has "
            f"{found}; pass the data set that was recorded"
        )
    reader = register(reader)
    recorded = RecordedDataset(dataset, reader)
    for sample in sorted({0, plan.samples // 2, plan.samples - 1}):
        recorded[sample]
    return recorded


def register(reader: Reader) -> Reader:
    """Let `rows_of` find this record by its keys; returns it, or the same record if it is open."""
    return _OPEN.setdefault(reader.tag, reader)


def rows_of(key: Tensor) -> tuple[Reader, list[int]]:
    """The open record that a batch of keys belongs to, and its rows.

    Raises:
        RecordError: if the keys are not those of one open record.
    """
    if (
        not isinstance(key, Tensor)
        or key.dim() != 2
        or key.shape[1] != 2
        or key.dtype != torch.int64
    ):
        found = f"{key.dtype} {tuple(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise RecordError(
            f"recorded= takes the keys of a batch, int64 [B, 2], got {found}; pass the third item "
            "of the batches that the recorded data set gives"
        )
    tags = set(key[:, 0].tolist())
    if len(tags) != 1:
        raise RecordError(f"a batch holds keys of {len(tags)} records; use one record at a time")
    reader = _OPEN.get(tags.pop())
    if reader is None:
        raise RecordError(
            "the keys of this batch are not those of an open record; they come from a record that "
            "this process did not open: call open_record(path, dataset) first"
        )
    rows = key[:, 1].tolist()
    if not all(0 <= row < reader.description.rows for row in rows):
        raise RecordError("a key of this batch names a view that the record does not have")
    return reader, rows


def watch_views(reader: Reader, rows: list[int]) -> None:
    """Warn once if the first view of training comes again although other batches came between.

    Then an epoch has ended, and the next one shows the same views because nobody called
    `RecordedDataset.set_epoch`. A batch that is read several times in a row is not an epoch.
    """
    first = reader.first_rows
    if not first:
        reader.first_rows = rows
        return
    reader.moved_on = reader.moved_on or rows != first
    if reader.moved_on and first[0] in rows:
        reader.watching = False
        warn(
            f"a view of the record {reader.path} came a second time, but set_epoch was never "
            f"called: every epoch shows the same one of its {reader.description.views} views; call "
            "recorded.set_epoch(epoch) at the start of each epoch"
        )


def is_key(item: object) -> bool:
    """Whether this is a batch of keys of an open record."""
    if not isinstance(item, Tensor) or item.dtype != torch.int64 or item.dim() != 2:
        return False
    return item.shape[1] == 2 and len(item) > 0 and int(item[0, 0]) in _OPEN


def transform_of(dataset: Any) -> str:
    """The data set's description of its transforms, without addresses in memory."""
    names = ("transform", "transforms", "target_transform")
    parts = [f"{n}={getattr(dataset, n)!r}" for n in names if getattr(dataset, n, None) is not None]
    return stable(f"{type(dataset).__name__}({', '.join(parts)})")


def stable(description: str) -> str:
    """A description without addresses in memory, which differ from run to run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", description)
