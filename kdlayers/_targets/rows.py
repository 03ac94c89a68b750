"""From the teacher's tensors of any shape to checked rows in blocks of one size."""

from typing import Protocol

import torch
from torch import Tensor

from kdlayers._targets.labels import hard_labels, require_labels
from kdlayers._utils.chunks import work_dtype
from kdlayers.errors import ArgumentTypeError, FitError, ShapeError

BLOCK = 4096
"""Rows that a pass takes at a time, however the data are batched."""


class Pass(Protocol):
    """What one pass over the data does; ``finish`` gives the next pass, if there is one."""

    stage: str
    labelled: bool

    def take(self, rows: Tensor, labels: Tensor | None) -> None:
        """Take a block of rows [n, D] with labels [n] (None unless ``labelled``)."""
        ...

    def finish(self) -> "Pass | None":
        """End the pass, on all ranks together."""
        ...


class RowFitter:
    """A `kdlayers._targets.fitter.Fitter` that checks batches and feeds passes with blocks of rows.

    Blocks always hold `BLOCK` rows (the last one of a pass the rest), whatever the batches were, so
    that every matrix product is the same and the result does not depend on the batch size.
    """

    def __init__(self, first: Pass) -> None:
        self.stage = first.stage
        self._pass: Pass | None = first
        self._like: Tensor | None = None
        self._batch = 0
        self._blocks = Blocks()

    @torch.no_grad()
    def update(self, teacher: Tensor, targets: Tensor | None) -> None:
        """Take features [..., D] and labels: any leading part of ``[...]``, or None."""
        current = self._current()
        check_features(teacher)
        labels = hard_labels(teacher, require_labels(targets)) if current.labelled else None
        rows = self._checked(teacher.detach().reshape(-1, teacher.shape[-1]))
        labels = labels if labels is None else labels.to(rows.device).reshape(-1)
        self._batch += 1
        for block in self._blocks.push(rows, labels):
            self._feed(current, *block)

    @torch.no_grad()
    def end_pass(self) -> bool:
        """Finish the pass; True when another one is wanted."""
        current = self._current()
        for block in self._blocks.flush():
            self._feed(current, *block)
        self._batch = 0
        self._pass = current.finish()
        self.stage = self._pass.stage if self._pass else "done"
        return self._pass is not None

    def _current(self) -> Pass:
        if self._pass is None:
            raise FitError("this fitter has finished; take a new one from targets.fitter()")
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
        if rows.sum().isfinite():  # then all are; a sum may overflow though they are
            return rows
        finite = rows.isfinite().all(dim=1)
        if not finite.all():
            raise FitError(
                f"batch {self._batch} (counted from 0) has NaN or infinite features in "
                f"{int((~finite).sum())} of {len(rows)} rows; check the teacher and its inputs, "
                "and run it in float32 or bfloat16 if float16 overflows"
            )
        return rows

    def _feed(self, current: Pass, rows: Tensor, labels: Tensor | None) -> None:
        with torch.autocast(rows.device.type, enabled=False):
            current.take(rows, labels)


class Blocks:
    """Cuts rows and labels that arrive in pieces of any size into blocks of `BLOCK` rows."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._held = 0

    def push(self, rows: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        """Add rows; the full blocks that came about."""
        self._rows.append(rows)
        self._labels += [] if labels is None else [labels]
        self._held += len(rows)
        if self._held < BLOCK:
            return []
        full = self._held // BLOCK * BLOCK
        all_rows, all_labels = self._take_all()
        blocks = _pairs(all_rows[:full], None if all_labels is None else all_labels[:full])
        # A clone, so that the rest does not keep the whole batch alive.
        self.push(
            all_rows[full:].clone(), None if all_labels is None else all_labels[full:].clone()
        )
        return blocks

    def flush(self) -> list[tuple[Tensor, Tensor | None]]:
        """The rows that fill no block."""
        return _pairs(*self._take_all()) if self._held else []

    def _take_all(self) -> tuple[Tensor, Tensor | None]:
        rows = torch.cat(self._rows)
        labels = torch.cat(self._labels) if self._labels else None
        self._rows, self._labels, self._held = [], [], 0
        return rows, labels


def _pairs(rows: Tensor, labels: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    if labels is None:
        return [(part, None) for part in rows.split(BLOCK)]
    return list(zip(rows.split(BLOCK), labels.split(BLOCK), strict=True))


def check_features(features: object, width: int | None = None) -> None:
    """Raise unless ``features`` is a float tensor [..., D], with D = ``width`` where given."""
    if not isinstance(features, Tensor):
        raise ArgumentTypeError(f"features must be a tensor, got {type(features).__name__}")
    if not features.is_floating_point():
        raise ArgumentTypeError(f"features must be a floating-point tensor, got {features.dtype}")
    if features.dim() == 0 or features.shape[-1] == 0:
        raise ShapeError(f"features must be [..., D] with D > 0, got {list(features.shape)}")
    if width is not None and features.shape[-1] != width:
        raise ShapeError(
            f"features must be [..., {width}], as at fit, got {list(features.shape)}; the channels "
            "are the last axis: for maps [B, C, H, W] use .movedim(1, -1)"
        )
