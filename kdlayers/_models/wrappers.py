"""Checks the wrappers of the two models, and that the models are distinct."""

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kdlayers.errors import ArgumentTypeError, AttachError


def unwrap(model: nn.Module, label: str) -> tuple[nn.Module, nn.Module]:
    """The model inside ``torch.compile``'s wrapper, and what to call for a forward.

    Raises:
        ArgumentTypeError: if this is not a module.
        AttachError: if it is wrapped for several devices.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"the {label} must be a torch.nn.Module, got {type(model).__name__}; the order is "
            "attach_kd(student, teacher, at=[...])"
        )
    inner = getattr(model, "_orig_mod", None)
    inner = inner if isinstance(inner, nn.Module) else model
    if isinstance(inner, DataParallel):
        raise AttachError(
            f"the {label} is wrapped in DataParallel, whose replicas each see a part of the batch; "
            "use DistributedDataParallel, and call attach_kd before wrapping"
        )
    if label == "student":
        _refuse_sharded(inner)
    return inner, model


def sharded(model: nn.Module) -> bool:
    """Whether a parameter is spread over several processes (FSDP2, tensor parallelism)."""
    # After a forward, FSDP2 leaves the parameters of the outermost module whole for a while.
    fsdp = any(hasattr(type(module), "unshard") for module in model.modules())
    return fsdp or any(type(parameter).__name__ == "DTensor" for parameter in model.parameters())


def flattened(model: nn.Module) -> bool:
    """Whether FullyShardedDataParallel (FSDP1) wraps a part of the model."""
    return any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules())


def _refuse_sharded(student: nn.Module) -> None:
    split = sharded(student) or flattened(student)
    if split or isinstance(student, DistributedDataParallel):
        wrapper = "FSDP" if split else "DistributedDataParallel"
        raise AttachError(
            f"the student is wrapped in {wrapper} already, which would not synchronise parameters "
            "added now; call attach_kd(student, ...) first, then wrap the student"
        )


def check_pair(student: nn.Module, teacher: nn.Module) -> None:
    """Check that student and teacher are two models.

    Raises:
        AttachError: if they are the same model, or share parameters.
    """
    if student is teacher:
        raise AttachError(
            "student and teacher are the same model; pass a separate teacher, for instance "
            "copy.deepcopy(student) for self-distillation"
        )
    ours = {id(p): name for name, p in student.named_parameters()}
    shared = [name for name, p in teacher.named_parameters() if id(p) in ours]
    if shared:
        raise AttachError(
            f"student and teacher share {len(shared)} parameters, such as the teacher's "
            f"{shared[0]!r}; pass a teacher with its own parameters, for instance "
            "copy.deepcopy(teacher)"
        )
