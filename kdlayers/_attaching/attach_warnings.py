"""What attach_kd warns of: models and losses that may not do what the user means."""

from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule

from kdlayers._models.randomness import is_random
from kdlayers._models.trace import Trace
from kdlayers._models.values import are_probabilities, have_unit_length
from kdlayers._models.wrappers import peft_part
from kdlayers._step.sites import inserts
from kdlayers._step.tape import Tape
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Term
from kdlayers._utils.warn import warn
from kdlayers.losses import ChannelWiseLoss


def warn_of_earlier(student: nn.Module, tape: Tape) -> None:
    """Warn of KD layers of an earlier handle that is still in use, as in a cell that is rerun."""
    earlier = [h.name for _, _, h in inserts(student) if h.tape is not tape and h.tape.armed]
    if earlier:
        warn(
            f"the student still contains the KD layers at {earlier} of an earlier attach_kd: call "
            "kd.remove() on the earlier handle first to remove them, or kd.detach() to keep them",
        )


def warn_of_adapters(student: nn.Module) -> None:
    """Warn of a student that peft has wrapped, because peft does not save layers added later."""
    part = peft_part(student)
    if part is not None:
        warn(
            f"the student already has adapters of peft (a {part}): peft will save them without the "
            "KD layers, so that a resumed run starts with new KD layers; call attach_kd first, and "
            'then get_peft_model(student, LoraConfig(..., modules_to_save=["kd"]))'
        )


def warn_of_prepared_graphs(student: nn.Module, points: Sequence[str]) -> None:
    """Warn of KD layers in a graph of torch.fx that was prepared for quantisation.

    Such a graph calls its modules in its own code, where hooks are unknown, and `convert_fx`
    replaces these modules.
    """
    observed = any(hasattr(module, "fake_quant_enabled") for module in student.modules())
    if points and observed and isinstance(student, GraphModule):
        warn(
            "the student was already prepared for quantisation: convert_fx would lose the KD "
            f"layers at {list(points)} without an error; train the KD layers in the float model "
            "first, call kd.detach(), and then prepare_qat_fx(student, ...), which puts them into "
            "the graph; losses can be attached to the prepared model"
        )


def warn_of_other_teachers(terms: Sequence[Term], teachers: Sequence[Teacher]) -> None:
    """Warn of terms that were fitted to something else and that ``kd.fit`` will not fit again."""
    for term in terms:
        source = term.learnt_elsewhere(teachers)
        if source is not None:
            warn(
                f"{term.name} keeps what it learnt from {source} in an earlier kd.fit, because "
                "kd.fit(loader) only learns what is missing: make new targets for this attach_kd, "
                "or call kd.fit(loader, refit=True)"
            )


def warn_of_buffers(teachers: Sequence[Teacher]) -> None:
    """Warn of buffers of the teachers that a forward changes."""
    changed = [name for teacher in teachers for name in teacher.traced.changed_buffers]
    if changed:
        names = ", ".join(map(repr, changed[:3])) + (", ..." if len(changed) > 3 else "")
        warn(
            f"a forward of the teacher changes its buffers {names} even in eval mode, as observers "
            "for quantisation do; kd.fit and kd.loss run the teacher on every batch, so these "
            "buffers will change in training: switch the observers off before, for instance with "
            "teacher.apply(torch.ao.quantization.disable_observer)"
        )


def warn_of_random(teachers: Sequence[Teacher]) -> None:
    """Warn of teachers whose output for the same images changes from one forward to the next."""
    for teacher in teachers:
        model, example = teacher.model, teacher.traced.example
        with teacher.lock:
            random = example is not None and is_random(model, example, teacher.traced.logits)
        if random:
            warn(
                f"two forwards of the teacher ({type(model).__name__}) in eval mode on the same "
                "images differ, as those of a masked auto-encoder do, which reads random patches; "
                "its features do not belong to the student's positions: pass a teacher that is not "
                "random, such as a ViTModel with the weights of a ViTMAE"
            )


def warn_of_values(terms: Sequence[Term], traced: Trace, teachers: Sequence[Teacher]) -> None:
    """Warn of losses on logits that read something else, as the outputs on the example show."""
    for term in terms:
        if term.point is not None:
            continue
        read = teachers if term.teacher_index is None else [teachers[term.teacher_index]]
        read_traces = [teacher.traced for teacher in read]
        if term.loss.on_logits:
            _warn_of_embeddings(term.name, [traced, *read_traces])
        if term.loss.on_logits or isinstance(term.loss, ChannelWiseLoss):
            _warn_of_probabilities(term.name, read_traces)


def _warn_of_embeddings(name: str, models: Sequence[Trace]) -> None:
    """Warn of unit vectors, as CLIP returns them."""
    found = next((traced for traced in models if have_unit_length(traced.logits)), None)
    if found is not None:
        warn(
            f"{name} reads the output of the {found.label} ({type(found.model).__name__}) as "
            "logits, but its rows are vectors of length 1, as CLIP's embeddings are: compare "
            "embeddings with FeatureLoss() or RKDLoss(), or return logits, which are products of "
            "embeddings times the logit scale"
        )


def _warn_of_probabilities(name: str, teachers: Sequence[Trace]) -> None:
    """Warn of teachers that have applied a softmax."""
    for found in teachers:
        if are_probabilities(found.logits):
            warn(
                f"{name} reads the logits of the teacher ({type(found.model).__name__}), but its "
                "output on the example sums to 1 over the classes, as after a softmax, which the "
                "loss would apply once more: let the teacher return its logits, or give the loss "
                "the module that makes them, at=(student's name, teacher's name)"
            )
