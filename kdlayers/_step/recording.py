"""Writes the teachers' outputs for a data set, and reads them instead of running the teachers."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from kdlayers._models.layouts import Layout
from kdlayers._records.dataset import (
    RecordedDataset,
    from_reader,
    is_key,
    register,
    rows_of,
    stable,
    transform_of,
)
from kdlayers._records.files import Description, Field, Reader
from kdlayers._records.topk import compress, expand
from kdlayers._records.views import check_repeatable, draw, image_check
from kdlayers._records.write import write_record
from kdlayers._step.fingerprint import weights_hash
from kdlayers._step.tape import Forward
from kdlayers._step.terms import Plan, Term
from kdlayers._utils.tree import leaves
from kdlayers._utils.warn import warn
from kdlayers.errors import ArgumentError, RecordError
from kdlayers.functional import _checks as check

FIRST_STEPS, EVERY = 20, 100
"""In which steps an image of the batch is compared with its checksum: the first, and each 100th."""


def record(
    plan: Plan,
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
    _check_arguments(dataset, views=views, batch_size=batch_size, dtype=dtype, topk=topk)
    if not check_repeatable(dataset, seed, views) and views > 1:
        warn(
            f"all views of the first samples are equal, so views={views} stores the same numbers "
            f"{views} times; use views=1, or give the data set a random transform"
        )

    def say(images: Tensor) -> list[Tensor]:
        return list(_said(plan, images, topk).values())

    image = draw(dataset, seed, 0, 0)[0]
    fields = []
    for name, tensor in _said(plan, image[None], topk).items():
        kind = dtype if tensor.is_floating_point() else "int32"
        fields.append(Field(name, tuple(tensor.shape[1:]), kind))
    about = {
        "transform": transform_of(dataset),
        "teachers": [
            {"class": type(t.model).__name__, "weights": weights_hash(t.model), "weight": t.weight}
            for t in plan.teachers
        ],
        "teacher_transform": [stable(repr(t.transform)) for t in plan.teachers],
        "layouts": {name: _kind(term) for name, term in _names(plan.terms)},
        "taps": {n: [t.teacher_index or 0, t.tap] for n, t in _names(plan.terms) if t.tap},
        "classes": [int(t.traced.logits.shape[-1]) for t in plan.teachers],
        "topk": topk,
    }
    size = min(batch_size, len(dataset) * views)
    made = Description(len(dataset), views, seed, size, tuple(fields), about)
    write_record(dataset, path, made, say, num_workers=num_workers, progress=progress)
    recorded = from_reader(register(Reader(path)), dataset)
    _plan_for(plan, recorded.reader)
    return recorded


def _check_arguments(
    dataset: Any, *, views: int, batch_size: int, dtype: str, topk: int | None
) -> None:
    for name, value in (("views", views), ("batch_size", batch_size), ("topk", topk)):
        if value is not None:
            check.count(name, value)
    check.one_of("dtype", dtype, ("float16", "float32"))
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ArgumentError(
            f"kd.record needs a data set with a length and samples by index, got "
            f"{type(dataset).__name__}; an IterableDataset has neither"
        )
    if len(dataset) == 0:
        raise ArgumentError("kd.record was given an empty data set")


def _said(plan: Plan, images: Tensor, topk: int | None) -> dict[str, Tensor]:
    """The tensors of a record's fields for a batch of images."""
    found = plan.of_teachers(plan.teach((images,), {}))
    said: dict[str, Tensor] = {}
    for (name, term), tensor in zip(_names(plan.terms), found, strict=True):
        if name in said or f"{name}.top" in said:
            continue
        if term.tap is not None or topk is None:
            said[name] = _stored(term, tensor)
            continue
        if topk >= tensor.shape[1]:
            raise ArgumentError(
                f"topk={topk} of {tensor.shape[1]} classes keeps everything; leave topk out"
            )
        said[f"{name}.top"], said[f"{name}.kept"] = compress(tensor, topk)
    return said


def _names(terms: Sequence[Term]) -> Iterator[tuple[str, Term]]:
    """The field that each term reads; terms that read the same tensor share one."""
    numbers: dict[str, list[tuple[float, float]]] = {}
    for term in terms:
        if term.tap is None:
            who = "all teachers" if term.teacher_index is None else f"teacher {term.teacher_index}"
            yield f"logits of {who}", term
            continue
        name = f"{term.tap} of teacher {term.teacher_index or 0}"
        if term.readers is not None:
            yield f"{name}, {'class token' if term.readers[1].class_token else 'mean'}", term
            continue
        grids = numbers.setdefault(name, [])
        if term.shrink not in grids:
            grids.append(term.shrink)
        number = grids.index(term.shrink)
        yield (f"{name}, grid {number + 1}" if number else name), term


def _kind(term: Term) -> str | None:
    """The layout of a field's rows; None if they are not pooled."""
    layout = term.teacher_layout
    if layout is None or not term.on_grid:
        return None
    return "NCHW" if layout.kind == "NCHW" else "NHWC"


def _stored(term: Term, tensor: Tensor) -> Tensor:
    """The teacher's tensor on the grid that the loss reads, in its own order of axes."""
    if not term.on_grid:
        return tensor
    alone = term.teacher_alone(tensor)  # [B, h, w, C] for scores, [B, C, h, w] for features
    kind = "NHWC" if term.scores else "NCHW"
    if kind == _kind(term):
        return alone
    return alone.movedim(-1, 1) if kind == "NHWC" else alone.movedim(1, -1)


def teacher_tensors(plan: Plan, batch: Any, images: Any) -> list[Tensor]:
    """The teacher's tensor of each term for `KDHandle.fit`.

    The teachers run on the batch's images, or a record is read where the batch has its keys.
    """
    key = batch[2] if isinstance(batch, (tuple, list)) and len(batch) == 3 else None
    if key is not None and is_key(key):
        reader, rows = rows_of(key)
        plan, tensors = _plan_for(plan, reader), read(plan.terms, reader, rows)
    else:
        args = images if isinstance(images, tuple) else (images,)
        tensors = plan.of_teachers(plan.teach(args, {}))
    found = zip(plan.terms, tensors, strict=True)
    return [term.teacher_alone(tensor) for term, tensor in found]


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
    if reader.check_inputs and (step < FIRST_STEPS or step % EVERY == 0):
        _check_image(reader, rows, forward, step % len(rows))
    return _plan_for(plan, reader), read(plan.terms, reader, rows)


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


def _plan_for(plan: Plan, reader: Reader) -> Plan:
    """The plan whose terms read the record; it keeps the record open."""
    if reader.tag not in plan.recorded:
        terms = recorded_terms(plan.terms, reader)
        check_teachers(plan, reader)
        plan.recorded[reader.tag] = (Plan(terms, plan.teachers), reader)
    return plan.recorded[reader.tag][0]


def recorded_terms(terms: Sequence[Term], reader: Reader) -> list[Term]:
    """The terms as they read the teacher's tensor from the record.

    Raises:
        RecordError: if the record lacks a field.
    """
    layouts = reader.description.about["layouts"]
    found = []
    for name, term in _names(terms):
        if name not in layouts:
            raise RecordError(
                f"{term.name} reads the {name}, which the record {reader.path} does not hold (it "
                f"has {', '.join(layouts)}); record with the losses and points that you train with"
            )
        kind = layouts[name]
        layout = term.teacher_layout if kind is None else Layout(kind)
        found.append(replace(term, teacher_layout=layout, shrink=(1.0, 1.0)))
    return found


def read(terms: Sequence[Term], reader: Reader, rows: Sequence[int]) -> list[Tensor]:
    """The teachers' tensor of each term for some rows of a record."""
    about, data = reader.description.about, reader.read(rows)
    found: dict[str, Tensor] = {}
    for name, term in _names(terms):
        if name in found:
            continue
        if name in data:
            found[name] = data[name].float()
        else:
            classes = about["classes"][term.teacher_index or 0]
            found[name] = expand(data[f"{name}.top"], data[f"{name}.kept"], classes)
    return [found[name] for name, _ in _names(terms)]


def check_teachers(plan: Plan, reader: Reader) -> None:
    """Check that the record is one of this handle's teachers.

    Raises:
        RecordError: if the number of teachers, their weights or their shares are others.
    """
    stated = reader.description.about["teachers"]
    if len(stated) != len(plan.teachers):
        raise RecordError(
            f"the record {reader.path} is of {len(stated)} teachers, but this handle has "
            f"{len(plan.teachers)}; attach the teachers that were recorded"
        )
    for index, (teacher, known) in enumerate(zip(plan.teachers, stated, strict=True)):
        same = weights_hash(teacher.model) == known["weights"]
        if not same or teacher.weight != known["weight"]:
            what = "its teacher_weights" if same else "its weights"
            raise RecordError(
                f"the record {reader.path} was made with another teacher {index}: {what} differ; "
                "attach the teacher that was recorded, or call kd.record(...) into a new folder"
            )
