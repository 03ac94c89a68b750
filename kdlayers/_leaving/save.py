"""Saving a student with its KD layers, and loading it into a fresh model without the teacher."""

from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdlayers._models.wrappers import unwrap
from kdlayers._step.hooks import SLOT, InsertLayer, Slot, guard_hooks
from kdlayers._step.sites import home_of, inserts, place, take_out
from kdlayers._step.tape import Tape
from kdlayers._utils.tree import Path
from kdlayers.errors import AttachError, CheckpointError

FORMAT = "kdlayers student"
VERSION = 1

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class LayerDescription:
    """What is needed to put one KD layer into a fresh model; its tensors are in the state dict."""

    name: str
    path: Path
    in_channels: int
    num_templates: int
    alpha: float
    channel_dim: int


def save_student(student: nn.Module, path: str | PathLike[str]) -> None:
    """Save the student's weights and where its KD layers are.

    The file holds tensors, names and numbers only: no code, and nothing of the teacher.

    Args:
        student: a model with KD layers, attached or detached.
        path: file to write.

    Raises:
        AttachError: if the model has no KD layers; save its ``state_dict()`` as usual then.

    Example:
        >>> import tempfile, torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDPoint, attach_kd, load_student, save_student
        >>> student = resnet18()
        >>> kd = attach_kd(student, at=[KDPoint("layer4", num_templates=16)])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_student(student, f"{folder}/student.pt")
        ...     fresh = load_student(resnet18(), f"{folder}/student.pt")
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.equal(student.eval()(images), fresh.eval()(images))
        True
    """
    student, _ = unwrap(student, "student")
    layers = [asdict(_describe(module, hook)) for module, _, hook in inserts(student)]
    if not layers:
        raise AttachError(
            f"this {type(student).__name__} has no KD layers, so there is nothing to describe; "
            "save student.state_dict() with torch.save, or attach_kd first"
        )
    found = student.state_dict()
    state = {key: value.detach().cpu() for key, value in found.items()}
    # Some modules read the version that they wrote their state with.
    metadata: dict[str, dict[str, Any]] = getattr(found, "_metadata", {})
    versions = {name: meta.get("version") for name, meta in metadata.items()}
    content = {"format": FORMAT, "version": VERSION, "layers": layers, "state": state}
    torch.save({**content, "module_versions": versions}, path)


def _describe(module: nn.Module, hook: InsertLayer) -> LayerDescription:
    head, alpha = hook.slot(module).head, hook.slot(module).alpha
    return LayerDescription(
        hook.name, hook.path, head.in_channels, head.num_templates, alpha, head.channel_dim
    )


def load_student(model: M, path: str | PathLike[str]) -> M:
    """Put the saved KD layers into a fresh ``model`` and load all weights; no teacher is needed.

    Args:
        model: a model of the class and sizes that the student was made with, without KD layers.
        path: a file of :func:`save_student`. It is read with ``weights_only=True``.

    Returns:
        The same ``model``, on the device where it was, with its training flags.

    Raises:
        CheckpointError: if the file is damaged, of an unknown version, or of another model; the
            model is then as it was before.
        FileNotFoundError: if there is no file.
        AttachError: if the model has KD layers already.
    """
    inner, _ = unwrap(model, "student")
    if inserts(inner):
        raise AttachError("this model has KD layers already; load_student needs a fresh one")
    layers, state = _read(path)
    tape = Tape(armed=False)
    try:
        for layer in layers:
            _insert(inner, layer, state, tape)
        _check_state(inner, state)
    except BaseException:
        take_out(inner, tape)
        raise
    inner.load_state_dict(state)
    guard_hooks(reset=True)
    return model


def _read(
    path: str | PathLike[str],
) -> tuple[list[LayerDescription], OrderedDict[str, Tensor]]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch.load has no one exception for damaged files
        raise CheckpointError(
            f"{path} could not be read as a file of save_student: {error}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no file of save_student; load a plain checkpoint with "
            "model.load_state_dict(torch.load(path, weights_only=True))"
        )
    if content.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {content.get('version')!r}, this kdlayers reads version "
            f"{VERSION}; install a newer kdlayers"
        )
    state = content.get("state")
    versions = content.get("module_versions")
    parts = isinstance(state, dict), isinstance(versions, dict)
    if not all(parts) or not isinstance(content.get("layers"), list):
        raise CheckpointError(f"{path} is damaged: it has no layers, no versions or no state")
    return [_layer(item, path) for item in content["layers"]], _with_versions(state, versions)


def _with_versions(state: Any, versions: Any) -> OrderedDict[str, Tensor]:
    """The state as ``state_dict()`` gives it, with the version of every module that has one."""
    ordered: OrderedDict[str, Tensor] = OrderedDict(state)
    numbers = {str(name): v for name, v in versions.items() if isinstance(v, int)}
    metadata = OrderedDict((name, {"version": v}) for name, v in numbers.items())
    setattr(ordered, "_metadata", metadata)  # noqa: B010  # where torch keeps it
    return ordered


def _layer(item: Any, path: object) -> LayerDescription:
    """The description, checked field by field: the file may come from anywhere."""
    counts = ("in_channels", "num_templates", "channel_dim")
    fields = {"name", "path", "alpha", *counts}
    valid = (
        isinstance(item, dict)
        and set(item) == fields
        and isinstance(item["name"], str)
        and isinstance(item["path"], (list, tuple))
        and all(isinstance(key, (int, str)) for key in item["path"])
        and all(type(item[key]) is int for key in counts)
        and type(item["alpha"]) in (int, float)
        and item["channel_dim"] in (1, -1)
        and item["in_channels"] > 0
        and item["num_templates"] > 0
        and 0 <= item["alpha"] < float("inf")
    )
    if not valid:
        raise CheckpointError(f"{path} is damaged: a KD layer is described by {item!r}")
    return replace(LayerDescription(**item), path=tuple(item["path"]))


def _insert(
    model: nn.Module, layer: LayerDescription, state: dict[str, Tensor], tape: Tape
) -> None:
    names = dict(model.named_modules())
    if layer.name not in names:
        raise CheckpointError(
            f"the file has a KD layer at {layer.name!r}, which this {type(model).__name__} has "
            "not; pass a model of the class and sizes that the student was made with"
        )
    home = home_of(model, layer.name)
    prefix = next(name for name, module in names.items() if module is home)
    saved = state.get(f"{prefix}.{SLOT}.head.weight")
    sizes = (layer.num_templates, layer.in_channels)
    # Checked before any memory is taken: a false size must not be able to fill it.
    if not isinstance(saved, Tensor) or tuple(saved.shape) != sizes:
        raise CheckpointError(
            f"the KD layer at {layer.name!r} is described with (templates, channels) {sizes}, but "
            f"its weights are {None if saved is None else tuple(saved.shape)}: the file is damaged"
        )
    like = next((t for t in (*home.parameters(), *model.parameters())), saved)
    slot = _make(layer).to(like.device, saved.dtype)
    slot.train(home.training)
    place(model, layer.name, slot, layer.path, tape)


def _make(layer: LayerDescription) -> Slot:
    with torch.random.fork_rng(devices=[]):  # the random values are overwritten at once
        return Slot(
            layer.in_channels,
            layer.num_templates,
            alpha=layer.alpha,
            channel_dim=layer.channel_dim,
        )


def _check_state(model: nn.Module, state: dict[str, Any]) -> None:
    """Compare keys and shapes first, so that a wrong file leaves the model untouched."""
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    theirs = {k: tuple(v.shape) if isinstance(v, Tensor) else None for k, v in state.items()}
    wrong = [
        *(f"{key} is missing" for key in ours if key not in theirs),
        *(f"{key} is unknown" for key in theirs if key not in ours),
        *(
            f"{k} has shape {theirs[k]}, not {ours[k]}"
            for k in ours
            if theirs.get(k, ours[k]) != ours[k]
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the file's weights do not fit this {type(model).__name__}: "
            f"{'; '.join(wrong[:3])}{more}; pass a model of the class and sizes that the student "
            "was made with"
        )
