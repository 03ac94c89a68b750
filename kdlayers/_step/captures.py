"""Reading the tape: what the last training forward left, after checking that it can be trusted."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.outputs import main_output, why_unclear
from kdlayers._step.hooks import Tape, templates_of, version_of
from kdlayers.errors import AttachError, CaptureError, StaleCaptureError


@dataclass
class Record:
    """One training forward: the student's inputs, captured tensors and logits."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    features: dict[str, Tensor]
    logits: Tensor
    given: tuple[Any, ...]
    """The tensors that the student got: ``args``, or what they are copies of."""

    def autocast_dtype(self, student: nn.Module) -> torch.dtype | None:
        """Dtype of the autocast that the forward ran under, as far as its tensors show it."""
        low = (torch.float16, torch.bfloat16)
        dtypes = [t.dtype for t in (*self.features.values(), self.logits) if t.dtype in low]
        if not dtypes or any(p.dtype in low for p in student.parameters()):
            return None
        return dtypes[0]


def read(
    tape: Tape, keys: Collection[str], student: nn.Module, logits: Any, *, reads_logits: bool
) -> Record:
    """The record of the last forward, which is consumed: a second reading is refused.

    Raises:
        CaptureError: if there is no forward to read, a KD layer did not run in it, or a loss reads
            logits and they cannot be told from other tensors.
        StaleCaptureError: if there were several forwards, or the batch was changed since.
    """
    done, features, inputs, given_args = tape.done, tape.features, tape.inputs, tape.given
    output, repeated, version = tape.output, tape.repeated, tape.version
    tape.consume()
    if done == 0 or inputs is None:
        raise CaptureError(_no_forward(student))
    if done > 1:
        raise StaleCaptureError(
            f"{done} training forwards since the last kd.loss(), which belongs to exactly one: "
            "call kd.loss(y) after each forward, or kd.clear() after a forward that needs no KD "
            "loss"
        )
    if repeated is not None:
        raise AttachError(
            f"the module at {repeated!r} ran more than once in this forward; choose a point that "
            "runs once, find_points(model) lists them"
        )
    _check_features(features, keys)
    if version_of(inputs[0]) != version:
        raise StaleCaptureError(
            "the input batch was changed in place after the student's forward, so the teacher "
            "would see other images than the student did; change a copy, or call kd.loss(y) before"
        )
    given = output if logits is None else logits
    unclear = why_unclear(given) if reads_logits else None
    if unclear is not None:
        raise CaptureError(f"a loss reads the student's logits, but {unclear}")
    found = main_output(given)
    if found is None:
        raise CaptureError("with kd.batch(x) the logits are not seen: call kd.loss(y, logits=...)")
    return Record(*inputs, features, found, given_args)


def check_same(record: Record, args: tuple[Any, ...], version: int | None) -> None:
    """Check that the student ran on what the teacher was given by ``kd.teach``.

    Raises:
        StaleCaptureError: if not.
    """
    same = len(args) == len(record.given) and all(
        a is b for a, b in zip(args, record.given, strict=True)
    )
    copied = any(a is not b for a, b in zip(record.args, record.given, strict=True))
    if not same or (version_of(args) != version and not copied):
        raise StaleCaptureError(
            "kd.teach(x) and student(x) were given different batches; call kd.teach with the very "
            "tensors that the student gets next, or leave kd.teach out"
        )


def _no_forward(student: nn.Module) -> str:
    state = "" if student.training else " (the student is in eval mode now: call student.train())"
    return (
        "kd.loss() found no training forward of the student since the last kd.loss() or "
        f"backward(){state}; call student(x), not student.forward(x), in train mode with "
        "gradients, then kd.loss(y), then backward(); wrap other ways of running it in `with "
        "kd.batch(x):`"
    )


def _parts_require_grad(features: dict[str, Tensor], key: str) -> bool:
    templates = features.get(templates_of(key))
    return features[key].requires_grad or (templates is not None and templates.requires_grad)


def _check_features(features: dict[str, Tensor], keys: Collection[str]) -> None:
    missing = [key for key in keys if key not in features]
    if missing:
        raise CaptureError(
            f"{', '.join(missing)}: nothing was recorded in this forward although the student ran, "
            "so the hooks were bypassed: the model was compiled before attach_kd, or the module "
            "was replaced since (convert_sync_batchnorm, fuse); attach after such changes"
        )
    cut = [key for key in keys if not _parts_require_grad(features, key)]
    if cut:
        raise CaptureError(
            f"{', '.join(cut)}: recorded without a gradient, as reentrant gradient checkpointing "
            "does; use checkpoint(..., use_reentrant=False), or check that this part is not under "
            "no_grad"
        )
