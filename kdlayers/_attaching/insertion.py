"""Puts KD layers into a student, and checks in dry runs that they run and reach the output."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kdlayers._attaching.points import KDPoint
from kdlayers._models.dependence import depend
from kdlayers._models.examples import fresh, run_example, to_model
from kdlayers._models.outputs import main_output
from kdlayers._models.trace import Trace
from kdlayers._models.undisturbed import undisturbed
from kdlayers._step.sites import place, refuse_norm, refuse_shared, slots
from kdlayers._step.slot import Slot
from kdlayers._step.tape import Forward, Tape
from kdlayers._step.teacher import Teacher
from kdlayers._utils.tree import leaves
from kdlayers.errors import AttachError
from kdlayers.functional._checks import NARROW


def insert_layers(
    traced: Trace,
    points: Sequence[KDPoint],
    teachers: Sequence[Teacher],
    tape: Tape,
    memory: str,
) -> None:
    """Register a slot and its hook for every point."""
    student = traced.model
    others = {module for teacher in teachers for module in teacher.model.modules()}
    for point in points:
        refuse_norm(student, point.student)
        refuse_shared(student, point.student, others)
    layouts = [traced.layout(point.student) for point in points]
    for point, layout in zip(points, layouts, strict=True):
        call, dim = traced.call(point.student), layout.channel_dim
        # resolve_points has given every point its number of templates.
        templates = point.num_templates or 0
        with torch.device("cpu"):  # whatever the default device: the seed is the CPU's
            slot = Slot(
                call.shape[dim], templates, alpha=point.alpha, channel_dim=dim, memory=memory
            )
        slot.eval()  # the dry runs must not update its batch norm
        slot.to(call.device, _dtype_of(student, call.dtype))
        place(student, point.student, slot, call.path, tape)


def _dtype_of(student: nn.Module, features: torch.dtype) -> torch.dtype:
    """The dtype of a layer: that of the features, unless an autocast made these narrower."""
    cast = features in NARROW and not any(p.dtype in NARROW for p in student.parameters())
    return torch.float32 if cast else features


def check_layers(
    student: nn.Module, traced: Trace, example: tuple[Any, ...], tape: Tape, names: Sequence[str]
) -> None:
    """Check in two dry runs that the layers run, change nothing at alpha 0 and reach the output.

    Raises:
        AttachError: if one of these does not hold.
    """
    layers = slots(student)
    alphas = {name: layers[name].alpha for name in names}
    example = to_model(example, student)
    try:
        for name in names:
            layers[name].alpha = 0.0
        tape.forward, tape.active = Forward((), {}), True
        with undisturbed(student), torch.no_grad():  # from the same buffers as the first dry run
            plain = main_output(run_example(student, fresh(example), "student"))
        missing = [name for name in names if name not in tape.forward.scores]
    finally:
        tape.active = False
        tape.consume()
        for name, alpha in alphas.items():
            layers[name].alpha = alpha
    if missing:
        raise AttachError(
            f"the KD layer at {missing} was bypassed in a dry run: the model calls what is inside "
            "this module rather than the module; choose a block inside it, find_points(model) "
            "lists them"
        )
    if plain is None or not torch.allclose(plain, traced.logits, rtol=1e-4, atol=1e-6):
        raise AttachError(
            "the student's output changed although the KD layers were switched off: its eval-mode "
            f"forward is random, or it runs all children of a parent of {list(names)}; choose "
            "other points, find_points(model) lists them"
        )
    _check_reach(student, example, {name: layers[name] for name in names})


def _check_reach(student: nn.Module, example: tuple[Any, ...], layers: dict[str, Slot]) -> None:
    if not layers:
        return
    with torch.enable_grad():
        outputs = [tensor for _, tensor in leaves(student(*fresh(example)))]
    reached = depend(outputs, [layer.value.weight for layer in layers.values()])
    dead = [name for name, yes in zip(layers, reached, strict=True) if not yes]
    if dead:
        raise AttachError(
            f"the output of {dead} does not reach the model's output, so a KD layer there would "
            "learn nothing from the labels and change nothing; choose an earlier point, "
            "find_points(model) lists them"
        )
