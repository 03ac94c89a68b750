"""Reads the teachers' outputs from a record instead of running the teachers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kdlayers._models.layouts import Layout, Size
from kdlayers._records.dataset import (
    is_key,
    rows_of,
    stable,
    watch_views,
)
from kdlayers._records.files import Reader
from kdlayers._records.topk import expand
from kdlayers._records.views import image_check
from kdlayers._step.fingerprint import weights_hash
from kdlayers._step.grids import StudentGrids
from kdlayers._step.record_fields import names_of, on_grid, tap_of, why_not_topk
from kdlayers._step.recorded_teacher import AbsentModel
from kdlayers._step.tape import Forward
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Plan, Term
from kdlayers._utils.tree import leaves
from kdlayers.errors import RecordError

FIRST_STEPS, EVERY = 20, 100
"""In which steps an image of the batch is compared with its checksum: the first, and each 100th."""


def teacher_tensors(plan: Plan, student: StudentGrids, batch: Any, images: Any) -> list[Tensor]:
    """The teacher's tensor of each term for `KDHandle.fit`.

    The teachers run on the batch's images, or a record is read where the batch has its keys.
    """
    args = images if isinstance(images, tuple) else (images,)
    key = batch[-1] if isinstance(batch, (tuple, list)) else None
    if key is not None and is_key(key):
        ours = student.of(plan.terms, args)
        reader, rows = rows_of(key)
        plan, names = plan_for(plan, reader, ours)
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
    found, names = plan_for(plan, reader, [term.student_grid(forward) for term in plan.terms])
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


def plan_for(plan: Plan, reader: Reader, ours: Sequence[Size | None]) -> tuple[Plan, Sequence[str]]:
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
        RecordError: if the record has neither, or only the largest logits for a loss on all.
    """
    held, own = reader.description.about["layouts"], reader.description.about["grids"]
    topk, why = reader.description.about["topk"], why_not_topk(terms)
    if topk is not None and why is not None:
        raise RecordError(
            f"the record {reader.path} has only the {topk} largest logits, but {why}; record "
            "without topk"
        )
    found = []
    for term, name in zip(terms, names_of(terms, own, ours), strict=True):
        whole = name
        if term.on_grid and tap_of(term) in own:
            whole = on_grid(tap_of(term), own[tap_of(term)])
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
