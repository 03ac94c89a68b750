"""Writes the teachers' outputs for a data set, and reads them instead of running the teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kdlayers._models.layouts import Layout, Size
from kdlayers._records.dataset import (
    RecordedDataset,
    from_reader,
    is_key,
    register,
    rows_of,
    stable,
    transform_of,
    watch_views,
)
from kdlayers._records.files import Description, Field, Reader
from kdlayers._records.topk import compress, expand
from kdlayers._records.views import check_repeatable, draw, image_check
from kdlayers._records.write import Run, write_record
from kdlayers._step.fingerprint import weights_hash
from kdlayers._step.grids import StudentGrids
from kdlayers._step.recorded_teacher import AbsentModel, describe
from kdlayers._step.tape import Forward
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Plan, Term, size_of
from kdlayers._utils.distributed import together
from kdlayers._utils.tree import leaves
from kdlayers._utils.warn import warn
from kdlayers.errors import ArgumentError, RecordError
from kdlayers.functional import _checks as check

FIRST_STEPS, EVERY = 20, 100
"""In which steps an image of the batch is compared with its checksum: the first, and each 100th."""


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
    _plan_for(plan, recorded.reader, ours)
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
    names = _names(plan.terms, own, ours)

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
        "layouts": {name: _kind(term) for name, term in zip(names, plan.terms, strict=True)},
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
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ArgumentError(
            f"kd.record needs a data set with a length and samples by index, got "
            f"{type(dataset).__name__}; an IterableDataset has neither"
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
            found[_tap(term)] = list(size_of(term.teacher_layout.to_grid(tensor)))
    return found


def _names(
    terms: Sequence[Term], own: Mapping[str, Sequence[int]], ours: Sequence[Size | None]
) -> list[str]:
    """The field that each term reads; terms that read the same tensor share one.

    The name of a map says its grid, which depends on the teacher's own grid and on the student's.
    So it is the same in every handle, whatever other losses there are.
    """
    names = []
    for term, size in zip(terms, ours, strict=True):
        if term.tap is None:
            who = "all teachers" if term.teacher_index is None else f"teacher {term.teacher_index}"
            names.append(f"logits of {who}")
        elif term.readers is not None:
            token = "class token" if term.readers[1].class_token else "mean"
            names.append(f"{_tap(term)}, {token}")
        elif term.on_grid and _tap(term) in own:
            rows, columns = own[_tap(term)]
            names.append(_on_grid(_tap(term), term.compared((rows, columns), size)))
        else:
            names.append(_tap(term))
    return names


def _tap(term: Term) -> str:
    return f"{term.tap} of teacher {term.teacher_index or 0}"


def _on_grid(tap: str, grid: Sequence[int]) -> str:
    return f"{tap}, {grid[0]} x {grid[1]}"


def _kind(term: Term) -> str | None:
    """The layout of a field's rows; None if they are not pooled."""
    layout = term.teacher_layout
    if layout is None or not term.on_grid:
        return None
    return "NCHW" if layout.kind == "NCHW" else "NHWC"


def _stored(term: Term, tensor: Tensor, ours: Size | None) -> Tensor:
    """The teacher's tensor on the grid that the loss reads, in its own order of axes."""
    if not term.on_grid:
        return tensor
    alone = term.teacher_alone(tensor, ours)  # [B, h, w, C] for scores, [B, C, h, w] for features
    kind = "NHWC" if term.scores else "NCHW"
    if kind == _kind(term):
        return alone
    return alone.movedim(-1, 1) if kind == "NHWC" else alone.movedim(1, -1)


def teacher_tensors(plan: Plan, student: StudentGrids, batch: Any, images: Any) -> list[Tensor]:
    """The teacher's tensor of each term for `KDHandle.fit`.

    The teachers run on the batch's images, or a record is read where the batch has its keys.
    """
    args = images if isinstance(images, tuple) else (images,)
    key = batch[-1] if isinstance(batch, (tuple, list)) else None
    if key is not None and is_key(key):
        ours = student.of(plan.terms, args)
        reader, rows = rows_of(key)
        plan, names = _plan_for(plan, reader, ours)
        tensors = read(plan.terms, names, reader, rows)
    else:
        # The teacher first: its error on wrong images says more than the student's warning.
        tensors = plan.of_teachers(plan.teach(args, {}))
        ours = student.of(plan.terms, args)
    found = zip(plan.terms, tensors, ours, strict=True)
    return [term.teacher_alone(tensor, size) for term, tensor, size in found]


def read_batch(
    plan: Plan, key: Tensor, forward: Forward, logits: Tensor, step: int
) -> tuple[Plan, list[Tensor]]:
    """The terms as they read the record that ``key`` belongs to, and the tensor of each.

    Raises:
        RecordError: if the record is of other teachers or losses, or the keys are not those of the
            images that the student got.
    """
    reader, rows = rows_of(key)
    if len(rows) != logits.shape[0]:
        raise RecordError(
            f"recorded= holds {len(rows)} keys for a forward of {logits.shape[0]} images; pass the "
            "keys of the same batch that the student got"
        )
    if reader.watching:
        watch_views(reader, rows)
    if reader.check_inputs and (step < FIRST_STEPS or step % EVERY == 0):
        _check_image(reader, rows, forward, step % len(rows))
    found, names = _plan_for(plan, reader, [term.student_grid(forward) for term in plan.terms])
    return found, read(found.terms, names, reader, rows)


def _check_image(reader: Reader, rows: Sequence[int], forward: Forward, index: int) -> None:
    inputs = [tensor for _, tensor in leaves((forward.args, forward.kwargs)) if tensor.dim() > 1]
    row = rows[index]
    if inputs and image_check(inputs[0][index]) != int(reader.image_checks[row]):
        view, sample = divmod(row, reader.description.samples)
        raise RecordError(
            f"image {index} of the batch is not the image that the record has for its key (view "
            f"{view} of sample {sample}): the batch was mixed, normalised or converted after the "
            "data set gave it; do so inside the data set's transform, or, if the teacher's output "
            "for the recorded images is what you want, set recorded.check_inputs = False"
        )


def _plan_for(
    plan: Plan, reader: Reader, ours: Sequence[Size | None]
) -> tuple[Plan, Sequence[str]]:
    """The plan whose terms read the record, and their fields; it keeps the record open."""
    key = (reader.tag, *ours)
    if key not in plan.recorded:
        check_teachers(plan, reader)
        names = _fields(plan.terms, reader, ours)
        terms = recorded_terms(plan.terms, names, reader)
        plan.recorded[key] = (Plan(terms, plan.teachers), names, reader)
    found, names, _ = plan.recorded[key]
    return found, names


def _fields(terms: Sequence[Term], reader: Reader, ours: Sequence[Size | None]) -> list[str]:
    """The field that each term reads: on the grid that the loss compares, or on the teacher's own.

    The teacher's own grid is pooled in the step, as that of a live teacher is. A field of any other
    grid would be pooled twice, which gives other numbers.

    Raises:
        RecordError: if the record has neither.
    """
    held, own = reader.description.about["layouts"], reader.description.about["grids"]
    found = []
    for term, name in zip(terms, _names(terms, own, ours), strict=True):
        whole = (
            _on_grid(_tap(term), own[_tap(term)]) if term.on_grid and _tap(term) in own else name
        )
        if name not in held and whole not in held:
            raise RecordError(
                f"{term.name} reads the {name}, which the record {reader.path} does not hold (it "
                f"has {'; '.join(held)}); record with the losses, the points and a student with "
                "the grids that you train with"
            )
        found.append(name if name in held else whole)
    return found


def recorded_terms(terms: Sequence[Term], names: Sequence[str], reader: Reader) -> list[Term]:
    """The terms as they read the teacher's tensors from these fields of the record."""
    layouts = reader.description.about["layouts"]
    found = []
    for term, name in zip(terms, names, strict=True):
        layout = term.teacher_layout if layouts[name] is None else Layout(layouts[name])
        found.append(replace(term, teacher_layout=layout, shrink=(1.0, 1.0)))
    return found


def read(
    terms: Sequence[Term], names: Sequence[str], reader: Reader, rows: Sequence[int]
) -> list[Tensor]:
    """The teachers' tensor of each term for some rows of a record."""
    data = reader.read(rows)
    found: dict[str, Tensor] = {}
    for name, term in zip(names, terms, strict=True):
        if name in found:
            continue
        if name in data:
            found[name] = data[name].float()
        else:
            about = reader.description.about["teachers"][term.teacher_index or 0]
            found[name] = expand(data[f"{name}.top"], data[f"{name}.kept"], about["logits"][0])
    return [found[name] for name in names]


def check_teachers(plan: Plan, reader: Reader) -> None:
    """Check that the record is one of this handle's teachers.

    Raises:
        RecordError: if the number of teachers, their weights, shares or transforms are others.
    """
    stated = reader.description.about["teachers"]
    if len(stated) != len(plan.teachers):
        raise RecordError(
            f"the record {reader.path} is of {len(stated)} teachers, but this handle has "
            f"{len(plan.teachers)}; attach the teachers that were recorded"
        )
    for index, (teacher, known) in enumerate(zip(plan.teachers, stated, strict=True)):
        what = _difference(teacher, known)
        if what is not None:
            raise RecordError(
                f"the record {reader.path} was made with another teacher {index}: {what}; attach "
                "the teacher that was recorded, or call kd.record(...) into a new folder"
            )


def _difference(teacher: Teacher, known: Mapping[str, Any]) -> str | None:
    """How a teacher differs from the recorded one; None if it does not."""
    if weights_hash(teacher.model) != known["weights"]:
        return "its weights differ"
    if teacher.weight != known["weight"]:
        return "its teacher_weights differ"
    found = stable(repr(teacher.transform))
    if isinstance(teacher.model, AbsentModel) or found == known["transform"]:
        return None
    return f"its teacher_transform was {known['transform']}, and is {found} now"
