"""Converts the teacher's tensors of any shape to checked rows in blocks of equal size."""

from typing import Protocol

import torch
from torch import Tensor

from kdlayers._targets.base import check_features
from kdlayers._targets.labels import hard_labels
from kdlayers.errors import FitError, ShapeError
from kdlayers.functional._checks import work_dtype

BLOCK = 4096
"""Rows in a block, for any batch size."""


class Pass(Protocol):
    """One pass over the data; ``finish`` returns the next pass, if there is one."""

    stage: str
    labelled: bool
    """Whether the pass needs labels; if not, it gets zeros."""

    def take(self, rows: Tensor, labels: Tensor) -> None:
        """Take a block of rows [n, D] with labels [n]."""
        ...

    def finish(self) -> "Pass | None":
        """End the pass, on all ranks together."""
        ...


class RowFitter:
    """A `kdlayers._targets.fitter.Fitter` that checks batches and passes on blocks of rows.

    All blocks have `BLOCK` rows for any batch size; only the last one of a pass may have fewer. So
    all matrix products are the same, and the result does not depend on the batch size.
    """

    def __init__(self, first: Pass, ignore_index: int | None = None) -> None:
        self.stage = first.stage
        self._ignore_index = ignore_index
        self._pass: Pass | None = first
        self._like: Tensor | None = None
        self._batch = self._rows = 0
        self._blocks = Blocks()

    @torch.no_grad()
    def update(self, teacher: Tensor, targets: Tensor | None) -> None:
        """Take features [..., D] and labels: ``[...]``, or one for each image, or None."""
        current = self._current()
        check_features(teacher)
        rows = self._checked(teacher.detach().reshape(-1, teacher.shape[-1]))
        labels = torch.zeros(len(rows), dtype=torch.long, device="cpu")
        if current.labelled:
            if targets is None:
                raise FitError(
                    "DecisionTargets learns from labels, but fit() got batches without them; use a "
                    "loader of (images, labels), or CodebookTargets at this point"
                )
            labels = hard_labels(teacher, targets).reshape(-1).to(rows.device)
            if self._ignore_index is not None:
                kept = labels != self._ignore_index
                rows, labels = rows[kept], labels[kept]
        self._batch += 1
        self._rows += len(rows)
        for block in self._blocks.push(rows, labels.to(rows.device)):
            self._feed(current, *block)

    @torch.no_grad()
    def flush(self) -> None:
        """Take the rows that did not fill a block, before the ranks finish the pass together."""
        current = self._current()
        for block in self._blocks.flush():
            self._feed(current, *block)
        if not self._rows:
            every = "all were empty"
            if self._ignore_index is not None:
                every += f", or all their labels were ignore_index={self._ignore_index}"
            raise FitError(f"fit() got batches without a single row: {every}")

    @torch.no_grad()
    def end_pass(self) -> bool:
        """Finish the pass; True if another one is needed."""
        self.flush()
        self._batch = self._rows = 0
        self._pass = self._current().finish()
        self.stage = self._pass.stage if self._pass else "done"
        return self._pass is not None

    def _current(self) -> Pass:
        if self._pass is None:
            raise FitError("this fitter has finished; get a new one from targets.fitter()")
        return self._pass

    def _checked(self, rows: Tensor) -> Tensor:
        if self._like is None:
            self._like = rows.new_empty(0, rows.shape[1], dtype=work_dtype(rows))
        if rows.shape[1] != self._like.shape[1]:
            raise ShapeError(
                f"batch {self._batch} has features of width {rows.shape[1]}, earlier batches had "
                f"{self._like.shape[1]}; the channels must be the last axis of every batch"
            )
        rows = rows.to(self._like)
        if rows.sum().isfinite():  # then all are finite; the reverse is not true (overflow)
            return rows
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            raise FitError(
                f"batch {self._batch} (counted from 0) has NaN or infinite features in "
                f"{int((~finite).sum())} of {len(rows)} rows; check the teacher and its inputs, "
                "and run it in float32 or bfloat16 if float16 overflows"
            )
        return rows

    def _feed(self, current: Pass, rows: Tensor, labels: Tensor) -> None:
        with torch.autocast(rows.device.type, enabled=False):
            current.take(rows, labels)


class Blocks:
    """Cuts rows and labels that arrive in pieces of any size into blocks of `BLOCK` rows."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._held = 0

    def push(self, rows: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Add rows; returns the blocks that are full now."""
        self._rows.append(rows)
        self._labels.append(labels)
        self._held += len(rows)
        if self._held < BLOCK:
            return []
        blocks = self.flush()
        rest = [] if len(blocks[-1][0]) == BLOCK else [blocks.pop()]
        for part, part_labels in rest:  # cloned, because a view would keep the whole batch alive
            self.push(part.clone(), part_labels.clone())
        return blocks

    def flush(self) -> list[tuple[Tensor, Tensor]]:
        """All remaining rows; the last block may not be full."""
        if not self._held:
            return []
        rows, labels = torch.cat(self._rows), torch.cat(self._labels)
        self._rows, self._labels, self._held = [], [], 0
        return list(zip(rows.split(BLOCK), labels.split(BLOCK), strict=True))
