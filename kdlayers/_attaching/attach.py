"""`attach_kd`: from two models and some names to a student with KD layers and a handle."""

import zlib
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from kdlayers._attaching.attach_warnings import (
    warn_of_adapters,
    warn_of_buffers,
    warn_of_earlier,
    warn_of_other_teachers,
    warn_of_prepared_graphs,
    warn_of_random,
    warn_of_values,
)
from kdlayers._attaching.insertion import check_layers, insert_layers
from kdlayers._attaching.points import KDPoint
from kdlayers._attaching.resolve import At, resolve_points
from kdlayers._attaching.shared_losses import warn_of_shared_losses
from kdlayers._layer.layer import check_memory
from kdlayers._models.detectors import NO_LOGITS, Pictures, inside
from kdlayers._models.examples import example_for
from kdlayers._models.trace import Trace, trace
from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import unwrap
from kdlayers._step.call import Transform
from kdlayers._step.handle import KDHandle
from kdlayers._step.hooks import Capture, CloseForward, OpenForward, drop_recording, guard_hooks
from kdlayers._step.recorded_teacher import RecordedTeacher
from kdlayers._step.sites import hook_site, inserts, take_out
from kdlayers._step.tape import Tape
from kdlayers._step.teacher import Teacher, check_mean, make_teachers
from kdlayers._step.term_making import example_pair, feature_term, unique_names
from kdlayers._step.terms import Term
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.losses import DistillLoss, TemplateLoss


def attach_kd(
    student: nn.Module,
    teacher: nn.Module | Sequence[nn.Module] | RecordedTeacher | None = None,
    at: At = (),
    *,
    losses: Iterable[DistillLoss] = (),
    example: Any = None,
    teacher_weights: Sequence[float] | None = None,
    teacher_transform: Transform | Literal["auto"] | None = None,
    memory: str = "normal",
) -> KDHandle:
    """Add KD layers, supervised by ``teacher``, to ``student`` with hooks; its code is unchanged.

    The student keeps its type, its forward, its names and its state-dict keys; the layers' keys are
    additional (``<point>...kd.*``). A layer acts on its module's own output: other hooks of the
    module run after it, and get what the next module gets. Both models are run on an example to
    find shapes; their flags, buffers and the random state are restored. New layers are drawn from
    the random state and the student's weights: the same seed and weights give the same layers, and
    students with other weights get other layers. To give copies of one student different layers,
    call ``torch.manual_seed`` before each call. Call it before ``torch.compile``, DDP or FSDP wrap
    the student. Every parameter exists on return, so make the optimiser after this call, as
    ``Optimizer([*student.parameters(), *kd.parameters()])``.

    Args:
        student: the model to train. A detector of torchvision is attached in its backbone, whose
            names may begin with ``"backbone."``; train it as a whole.
        teacher: the model to learn from. It is run in eval mode without gradients and not changed.
            ``None``: layers only, with ``num_templates`` given at the points. A list: losses on
            logits compare with the teachers' mean logits, KD layers and losses on features with
            the first teacher, unless a loss names one by its ``teacher_index``. A
            :class:`RecordedTeacher`: the outputs that :meth:`KDHandle.record` wrote.
        at: where the KD layers go: names of modules (the teacher's point has the same name; a name
            may be a glob such as ``"layer*"``, whose ``*`` does not match dots), a dict
            ``{student's name: teacher's name}``, or a list of :class:`KDPoint`. At the last point
            in forward order the default targets are ``CodebookTargets()``, at earlier ones
            ``DecisionTargets()``: one point is letKD-1, two are letKD-2.
        losses: further :class:`DistillLoss` objects, on logits or on features (their ``at``).
        example: a small batch of images, or a tuple of the model's arguments, for the dry runs;
            default: two zero images that suit the student.
        teacher_weights: weights of the teachers in the mean of their logits, made to sum to 1;
            default: all equal.
        teacher_transform: converts the images for the teacher. ``"auto"``, for timm models,
            converts from the mean, std, size and interpolation in the student's
            ``pretrained_cfg`` to those of the teacher's. Pass a :class:`Renormalize` for other
            models, or any function of the images. Default: none.
        memory: ``"low"``: in training, KD layers never store the scores of all positions but
            recompute them in chunks. ``"normal"`` (default): recompute them only where that costs
            no extra time, in large layers of up to 128 channels. The numbers are the same.

    Returns:
        The :class:`KDHandle`, with ``fit``, ``loss``, ``detach`` and ``remove``.

    Warns:
        KDLayersWarning: if student and teacher state different normalisations and no
            ``teacher_transform`` is given, if a teacher is random in eval mode, if a loss on logits
            reads probabilities or vectors of length 1, if peft has wrapped the student before, if
            the student is a graph that was prepared for quantisation and gets KD layers, or if a
            loss with parameters or buffers belongs to another handle that is in use.

    Raises:
        NoMatchError: if a name matches no module that runs; the message lists the nearest names.
        AttachError: if a point cannot take a layer, a layer does not reach the output, the student
            is wrapped or has KD layers already, or teacher and student share parameters.
        LayoutError: if it is unclear which axis holds the channels.
        ArgumentError: if there is nothing to attach, or an example is needed.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import attach_kd
        >>> student, teacher = resnet18(num_classes=10), resnet18(num_classes=10)
        >>> kd = attach_kd(student, teacher, at=["layer4.0", "layer4"])
        >>> sorted(set(k.rsplit(".kd.")[0] for k in student.state_dict() if ".kd." in k))
        ['layer4.0', 'layer4.1']
        >>> kd.remove()
    """
    whole, _ = unwrap(student, "student")
    student, losses, memory = inside(whole), check_losses(losses), check_memory(memory)
    args = example_for(whole, example)
    traced = trace(student, args, "student")
    if student is not whole:
        traced.unclear = NO_LOGITS
    teachers = make_teachers(student, teacher, args, teacher_weights, teacher_transform)
    if losses and not teachers:
        raise ArgumentError(
            "losses compare the student with a teacher, but no teacher was given; call "
            "attach_kd(student, teacher, losses=[...])"
        )
    points = resolve_points(at, traced, teachers[0].traced if teachers else None)
    if not points and not losses:
        raise ArgumentError(
            "nothing to attach: give at=[module names], losses=[...] or both; find_points(student) "
            "lists usable points"
        )
    tape = Tape()
    tape.copies = traced.changes_input
    with ExitStack() as undo, undisturbed(student):
        undo.callback(take_out, student, tape)
        _seed(student)
        insert_layers(traced, points, teachers, tape, memory)
        check_layers(student, traced, args, tape, [point.student for point in points])
        terms = _terms(points, losses, traced, teachers)
        _record_hooks(student, terms, traced, tape, undo)
        undo.pop_all()
    for module, _, hook in inserts(student):
        if hook.tape is tape:
            hook.slot(module).train(module.training)
    guard_hooks(reset=True)
    warn_of_random(teachers)
    for each in (traced, *(teacher.traced for teacher in teachers)):
        each.release()
    warn_of_earlier(student, tape)
    if points:
        warn_of_adapters(whole)
    warn_of_prepared_graphs(student, [point.student for point in points])
    warn_of_other_teachers(terms, teachers)
    warn_of_shared_losses(terms, tape)
    warn_of_buffers(teachers)
    warn_of_values(terms, traced, teachers)
    pictures = Pictures(whole) if student is not whole else None
    return KDHandle(student, teachers, terms, tape, pictures)


def _seed(student: nn.Module) -> None:
    """Seed new layers from the random state and the student's weights, within `undisturbed`.

    The random state is as before after attach_kd, so that without the weights two students
    attached one after the other would start with equal layers.
    """
    weights = [p.detach().flatten()[:64].double().cpu() for p in student.parameters()]
    # Meta tensors have no values.
    known = [w.numpy().tobytes() for w in weights if w.device.type == "cpu"]
    drawn = int(torch.randint(2**62, (), device="cpu"))
    torch.default_generator.manual_seed(drawn ^ zlib.crc32(b"".join(known)))


def check_losses(losses: Iterable[DistillLoss]) -> list[DistillLoss]:
    """The losses as a list, also of a single one.

    Raises:
        ArgumentTypeError: if one is no DistillLoss.
        ArgumentError: if one is a TemplateLoss, which needs a KD layer.
    """
    if not isinstance(losses, (DistillLoss, Iterable)):
        raise _no_loss(losses)
    given: list[DistillLoss] = [losses] if isinstance(losses, DistillLoss) else list(losses)
    for loss in given:
        if not isinstance(loss, DistillLoss):
            raise _no_loss(loss)
        if isinstance(loss, TemplateLoss):
            raise ArgumentError(
                "TemplateLoss needs a KD layer: instead of losses=[TemplateLoss(...)], pass "
                "at=[KDPoint(name, targets=...)]"
            )
    return given


def _no_loss(given: object) -> ArgumentTypeError:
    found = type(given).__name__
    if given is None:
        found = "None: leave losses out, or pass losses=[]"
    elif isinstance(given, type):
        found = f"the class {given.__name__}: write {given.__name__}()"
    return ArgumentTypeError(f"losses must be DistillLoss objects such as KDLoss(), got {found}")


def _terms(
    points: Sequence[KDPoint],
    losses: Sequence[DistillLoss],
    traced: Trace,
    teachers: Sequence[Teacher],
) -> list[Term]:
    """One term per point, then one per loss; creates the parameters that depend on shapes."""
    if not teachers:
        return []
    terms = []
    for point in points:
        tap = point.teacher or point.student
        loss = TemplateLoss(
            template_targets=point.targets, weight=point.weight, at=(point.student, tap)
        )
        name = f"TemplateLoss.{point.student}"
        terms.append(feature_term(name, loss, traced, teachers, point.student, tap))
    terms.extend(_loss_term(loss, traced, teachers) for loss in losses)
    unique_names(terms)
    for term in terms:
        if term.point is None:
            one = term.teacher_index
            read = teachers if one is None else [teachers[one]]
            for each in (traced, *(teacher.traced for teacher in read)):
                each.need_logits(term.name)
            check_mean(term.name, read)
        try:
            with torch.device("cpu"):  # whatever the default device: the seed is the CPU's
                term.loss.build(*example_pair(term, traced, teachers))
        except ShapeError as error:
            said = str(error)
            whose = "" if said.startswith(f"{term.name} ") else f"{term.name}: "
            raise ShapeError(f"{whose}{said}") from None
        term.loss.to(traced.logits.device)
    return terms


def _loss_term(loss: DistillLoss, traced: Trace, teachers: Sequence[Teacher]) -> Term:
    name = loss.name or type(loss).__name__
    if loss.teacher_index is not None and loss.teacher_index >= len(teachers):
        raise ArgumentError(
            f"{name} reads teacher {loss.teacher_index}, but there are {len(teachers)}; "
            "teacher_index counts them from 0"
        )
    if loss.at is None:
        return Term(name, loss, teacher_index=loss.teacher_index)
    ours, theirs = loss.at if isinstance(loss.at, tuple) else (loss.at, loss.at)
    one = not isinstance(loss.at, tuple)
    both = "; if its name differs, give both: at={}"
    point = _one(ours, traced, both.format(f"('its name', {theirs!r})") if one else "")
    teacher = teachers[loss.teacher_index or 0].traced
    tap = _one(theirs, teacher, both.format(f"({ours!r}, 'its name')") if one else "")
    return feature_term(loss.name or f"{name}.{point}", loss, traced, teachers, point, tap)


def _one(name: str, traced: Trace, advice: str) -> str:
    found = traced.find(name, advice)
    if len(found) > 1:
        raise ArgumentError(f"a loss reads one point, but {name!r} matches {found}; give one name")
    return found[0]


def _record_hooks(
    student: nn.Module, terms: Sequence[Term], traced: Trace, tape: Tape, undo: ExitStack
) -> None:
    """Hooks that are only needed for recording; they are removed with the handle."""
    if not terms:
        return
    undo.callback(drop_recording, student, tape)
    opens, closes = OpenForward(tape), CloseForward(tape)
    opens.key = student.register_forward_pre_hook(opens, with_kwargs=True, prepend=True).id
    closes.key = student.register_forward_hook(closes, always_call=True).id
    points = {term.point for term in terms if term.point is not None and not term.scores}
    for name in sorted(points):
        call = traced.call(name)
        tap = Capture(name, call.path, tape, copies=True if call.changed else None)
        tap.key = hook_site(student, name).register_forward_hook(tap).id
