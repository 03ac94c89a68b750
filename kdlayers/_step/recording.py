"""Writes the teachers' outputs for a data set into a record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from kdlayers._models.layouts import Size
from kdlayers._records.dataset import (
    RecordedDataset,
    from_reader,
    register,
    stable,
    transform_of,
)
from kdlayers._records.files import Description, Field, Reader
from kdlayers._records.topk import compress
from kdlayers._records.views import check_repeatable, draw
from kdlayers._records.write import Run, write_record
from kdlayers._step.fingerprint import weights_hash
from kdlayers._step.grids import StudentGrids
from kdlayers._step.record_fields import kind_of, names_of, tap_of, why_not_topk
from kdlayers._step.recorded_teacher import describe
from kdlayers._step.replay import plan_for
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Plan, Term, size_of
from kdlayers._utils.distributed import together
from kdlayers._utils.warn import warn
from kdlayers.errors import ArgumentError, RecordError
from kdlayers.functional import _checks as check


def record(
    plan: Plan,
    student: StudentGrids,
    dataset: Any,
    path: Path,
    *,
    views: int,
    batch_size: int,
    num_workers: int,
    dtype: str,
    topk: int | None,
    seed: int,
    progress: bool,
) -> RecordedDataset:
    """Write a record of what ``plan`` reads from its teachers; see `KDHandle.record`."""
    options = views, batch_size, dtype, topk, seed
    # A rank whose data set lacks a file must not leave the others waiting.
    made, say, ours = together(lambda: _planned(plan, student, dataset, *options))
    write_record(dataset, path, made, say, num_workers=num_workers, progress=progress)
    recorded = from_reader(register(Reader(path)), dataset)
    plan_for(plan, recorded.reader, ours)
    return recorded


def _planned(
    plan: Plan,
    student: StudentGrids,
    dataset: Any,
    views: int,
    batch_size: int,
    dtype: str,
    topk: int | None,
    seed: int,
) -> tuple[Description, Run, list[Size | None]]:
    """What a record will hold, what fills it, and the student's grids."""
    _check_dataset(dataset)
    check.one_of("dtype", dtype, ("float16", "float32"))
    views = check.count("views", views)
    batch_size = check.count("batch_size", batch_size)
    topk = None if topk is None else check.count("topk", topk)
    why = why_not_topk(plan.terms)
    if topk is not None and why is not None:
        raise ArgumentError(f"topk={topk} keeps the largest logits, but {why}; leave topk out")
    seed = check.integer("seed", seed)
    if not check_repeatable(dataset, seed, views) and views > 1:
        warn(
            f"all views of the first samples are equal, so views={views} stores the same numbers "
            f"{views} times; use views=1, or give the data set a random transform"
        )
    image = draw(dataset, seed, 0, 0)[0]
    ours = student.of(plan.terms, (image[None],))
    first = plan.of_teachers(plan.teach((image[None],), {}))
    own = _own_grids(plan.terms, first)
    names = names_of(plan.terms, own, ours)

    def say(images: Tensor) -> list[Tensor]:
        if own and images.shape[1:] != image.shape:
            raise RecordError(
                f"a batch has images of shape {tuple(images.shape[1:])}, but the first image had "
                f"{tuple(image.shape)}: a record needs images of one size"
            )
        found = plan.of_teachers(plan.teach((images,), {}))
        return list(_said(plan.terms, names, found, ours, topk).values())

    fields = []
    for name, tensor in _said(plan.terms, names, first, ours, topk).items():
        kind = dtype if tensor.is_floating_point() else "int32"
        fields.append(Field(name, tuple(tensor.shape[1:]), kind))
    about = {
        "transform": transform_of(dataset),
        "teachers": [
            _described(teacher, taps)
            for teacher, taps in zip(plan.teachers, plan.taps, strict=True)
        ],
        "layouts": {name: kind_of(term) for name, term in zip(names, plan.terms, strict=True)},
        "grids": own,
        "topk": topk,
    }
    size = min(batch_size, len(dataset) * views)
    made = Description(len(dataset), views, seed, size, tuple(fields), about)
    return made, say, ours


def _described(teacher: Teacher, taps: Sequence[str]) -> dict[str, Any]:
    return {
        "class": type(teacher.model).__name__,
        "weights": weights_hash(teacher.model),
        "weight": teacher.weight,
        "transform": stable(repr(teacher.transform)),
        **describe(teacher.traced, taps),
    }


def _check_dataset(dataset: Any) -> None:
    # The base class of IterableDataset has a __getitem__, which only raises an error.
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, IterableDataset):
        raise ArgumentError(
            f"kd.record needs a data set with a length and samples by index, got "
            f"{type(dataset).__name__}; an IterableDataset has no samples by index"
        )
    if len(dataset) == 0:
        raise ArgumentError("kd.record was given an empty data set")


def _said(
    terms: Sequence[Term],
    names: Sequence[str],
    tensors: Sequence[Tensor],
    ours: Sequence[Size | None],
    topk: int | None,
) -> dict[str, Tensor]:
    """The tensors of a record's fields, of what the teachers said for a batch of images."""
    said: dict[str, Tensor] = {}
    for name, term, tensor, size in zip(names, terms, tensors, ours, strict=True):
        if name in said or f"{name}.top" in said:
            continue
        if term.tap is not None or topk is None:
            said[name] = _stored(term, tensor, size)
            continue
        if tensor.dim() != 2:
            raise ArgumentError(
                f"topk={topk} keeps the largest logits of images, but these are class maps "
                f"{list(tensor.shape)}; leave topk out"
            )
        if topk >= tensor.shape[1]:
            raise ArgumentError(
                f"topk={topk} of {tensor.shape[1]} classes keeps everything; leave topk out"
            )
        said[f"{name}.top"], said[f"{name}.kept"] = compress(tensor, topk)
    return said


def _own_grids(terms: Sequence[Term], tensors: Sequence[Tensor]) -> dict[str, list[int]]:
    """The teachers' own grids at the points that losses compare position by position."""
    found: dict[str, list[int]] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        if term.on_grid and term.teacher_layout is not None:
            found[tap_of(term)] = list(size_of(term.teacher_layout.to_grid(tensor)))
    return found


def _stored(term: Term, tensor: Tensor, ours: Size | None) -> Tensor:
    """The teacher's tensor on the grid that the loss reads, in its own order of axes."""
    if not term.on_grid:
        return tensor
    alone = term.teacher_alone(tensor, ours)  # [B, h, w, C] for scores, [B, C, h, w] for features
    kind = "NHWC" if term.scores else "NCHW"
    if kind == kind_of(term):
        return alone
    return alone.movedim(-1, 1) if kind == "NHWC" else alone.movedim(1, -1)
