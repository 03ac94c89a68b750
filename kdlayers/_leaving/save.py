"""Saving a student with its KD layers, and loading it into a fresh model without the teacher."""

from os import PathLike
from typing import BinaryIO, TypeVar

from torch import nn

from kdlayers._leaving.insert import find_places, insert, slot_keys
from kdlayers._leaving.student_file import LayerDescription, pack, unpack
from kdlayers._leaving.wrapped import is_first_process, refuse_wrapped
from kdlayers._models.wrappers import innermost, plainly_named, student_inside
from kdlayers._step.hooks import InsertLayer, descend, guard_hooks
from kdlayers._step.sites import home_of, inserts
from kdlayers._utils.archives import read_archive, write_archive
from kdlayers._utils.undo import all_or_nothing
from kdlayers.errors import AttachError, CheckpointError

M = TypeVar("M", bound=nn.Module)


def save_student(student: nn.Module, path: str | PathLike[str] | BinaryIO) -> None:
    """Save the student's weights and where its KD layers are.

    The file holds tensors, names, numbers and their checksums: no code, and nothing of the teacher.
    It is written to a temporary file beside ``path`` and then renamed, so an existing file is never
    left half-written, even if the process is killed or the disk is full. A killed process may leave
    a temporary ``.kdlayers-*.tmp``.

    Wrappers such as ``torch.compile``, ``DistributedDataParallel`` or a moving average are not
    saved. A larger model that contains the student, such as a detector, is saved as a whole. Under
    FSDP2 all processes call this together, and the first one writes the file.

    Args:
        student: a model with KD layers, attached or detached.
        path: file to write, or a binary file object, which is written to directly.

    Raises:
        AttachError: if the model has no KD layers; in this case, save its ``state_dict()``.
        CheckpointError: if the file cannot hold its state; in this case, nothing is written.
        OSError: if the file cannot be written; an existing file is then unchanged.

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
    student = student_inside(student)
    layers = [_describe(student, module, hook) for module, _, hook in inserts(student)]
    if not layers:
        raise AttachError(
            f"this {type(student).__name__} has no KD layers, so save_student is not "
            "needed: save student.state_dict() with torch.save, or call attach_kd first"
        )
    content = pack(layers, student.state_dict())
    if is_first_process(student):
        write_archive(content, path)


def _describe(student: nn.Module, module: nn.Module, hook: InsertLayer) -> LayerDescription:
    slot = hook.slot(module)
    layer = LayerDescription(
        _full_name(student, module, hook),
        hook.path,
        slot.head.in_channels,
        slot.head.num_templates,
        float(slot.alpha),  # a NumPy number or a tensor could not be read back
        slot.head.channel_dim,
        slot.memory,
        float(slot.norm.eps),
    )
    changed = set(slot.state_dict()) ^ slot_keys()
    if changed:
        raise CheckpointError(
            f"the student cannot be saved: the KD layer at {layer.name!r} differs from a plain one "
            f"in {sorted(changed)}; take parametrizations and adapters off it first"
        )
    return layer


def _full_name(model: nn.Module, module: nn.Module, hook: InsertLayer) -> str:
    """The name in ``model`` of the point of ``hook``, which has its name in the student inside it.

    Homes are compared, because the hook itself is inside or outside of a checkpoint_wrapper.
    """
    names, home = dict(plainly_named(model)), descend(module, hook.store)
    own = next(name for name, child in names.items() if innermost(child) is innermost(module))
    parts = own.split(".")
    for length in range(len(parts) + 1):
        candidate = ".".join([*parts[:length], hook.name])
        if candidate in names and home_of(model, candidate) is home:
            return candidate
    return own


def load_student(model: M, path: str | PathLike[str] | BinaryIO) -> M:
    """Put the saved KD layers into a fresh ``model`` and load all weights; no teacher is needed.

    If anything fails, the model is unchanged. Before memory is allocated, the checksums of the file
    and of every tensor are checked, and keys and sizes are compared with those of the model.
    :func:`save_student` has an example.

    Args:
        model: a model of the class and sizes that the student was made with, without KD layers. It
            keeps its devices and dtypes, and the KD layers follow them.
        path: a file of :func:`save_student`, or a binary file object. It is read with
            ``weights_only=True``.

    Returns:
        The same ``model``, on the device where it was, with its training flags.

    Raises:
        CheckpointError: if the file is damaged, of an unknown version, or of another model.
        FileNotFoundError: if there is no file.
        AttachError: if the model has KD layers already, or is wrapped in DDP or FSDP.
    """
    refuse_wrapped(model)
    inner = student_inside(model)
    if inserts(inner):
        raise AttachError(
            "this model has KD layers already; load_student needs a new one: create it as the "
            "student was created, and do not call attach_kd"
        )
    saved = unpack(*read_archive(path))
    places = find_places(inner, saved)
    with all_or_nothing(inner):
        insert(inner, places, saved.state)
    guard_hooks(reset=True)
    return model
