"""Finds the models inside the wrappers of a training loop, and checks that they are distinct."""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from kdlayers._utils.torch_internals import child_table
from kdlayers.errors import ArgumentTypeError, AttachError

# Recognised by class name, so that their packages need not be imported.
_WRAPPERS = {
    ("torch", "OptimizedModule"): "_orig_mod",
    ("torch", "DistributedDataParallel"): "module",
    ("torch", "DataParallel"): "module",
    ("torch", "AveragedModel"): "module",
    ("timm", "ModelEmaV2"): "module",
    ("timm", "ModelEmaV3"): "module",
    ("lightning", "_FabricModule"): "_original_module",
    ("lightning_fabric", "_FabricModule"): "_original_module",
}

# The child of torch's checkpoint_wrapper and offload_wrapper. A module in them keeps the names of
# its tensors in state dicts, and attributes of the wrapper are those of the module.
CHECKPOINTED = "_checkpoint_wrapped_module"


def innermost(module: nn.Module) -> nn.Module:
    """``module``, or what torch's checkpoint_wrapper and offload_wrapper around it wrap."""
    while CHECKPOINTED in child_table(module):
        module = getattr(module, CHECKPOINTED)
    return module


def plain_name(name: str) -> str:
    """``name`` without checkpoint_wrapper, which keys of state dicts do not name either."""
    return ".".join(part for part in name.split(".") if part != CHECKPOINTED)


def plainly_named(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules by their `plain_name`; a checkpoint_wrapper stands for the module in it."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] != CHECKPOINTED:
            yield plain_name(name), module


def unwrap(model: nn.Module, label: str) -> tuple[nn.Module, nn.Module]:
    """The model inside ``torch.compile``'s wrapper, and what to call for a forward.

    Raises:
        ArgumentTypeError: if this is not a module.
        AttachError: if it is wrapped for several devices, or the student is TorchScript.
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
        if isinstance(inner, torch.jit.ScriptModule):
            raise AttachError(
                "the student is a TorchScript module, which takes no hooks; call attach_kd on the "
                "model before torch.jit.script, and script bake(student) after training"
            )
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


def peft_part(model: nn.Module) -> str | None:
    """The class of the first module in ``model`` that the library peft made; None without one."""
    kinds = (type(module) for module in model.modules())
    return next((kind.__name__ for kind in kinds if _is_from(kind, "peft")), None)


def _is_from(kind: type, package: str) -> bool:
    return any(base.__module__.split(".")[0] == package for base in kind.__mro__)


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


def student_inside(model: nn.Module) -> nn.Module:
    """``model`` without wrappers: ``torch.compile``, DDP, DataParallel and moving averages.

    These only call the model inside. A model of which the student is a part, such as a detector,
    stays whole.

    Raises:
        ArgumentTypeError: if ``model`` is not a module.
        AttachError: if it is wrapped in FSDP1, which hides the shapes of the parameters.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"the student must be a torch.nn.Module, got {type(model).__name__}; "
            "if an object holds the model, pass the model itself"
        )
    inner: nn.Module | None = model
    while inner is not None:
        model, inner = inner, _wrapped_by(inner)
    if _is_a(model, ("torch", "FullyShardedDataParallel")):
        raise AttachError(
            "the student is wrapped in FullyShardedDataParallel (FSDP1), which hides its "
            "parameters; use fully_shard (FSDP2), or save its full state dict and load that into "
            "a student with KD layers"
        )
    return model


def refuse_shards(student: nn.Module, call: str) -> None:
    """Raise AttachError if every process holds only a part of the student, as under FSDP2."""
    if sharded(student):
        raise AttachError(
            f"{call}() needs the whole student, but FSDP has split its parameters over the "
            "processes; call save_student(student, path) in all processes, and then "
            f"{call}(load_student(make_student(), path)) in one"
        )


def is_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is one of the wrappers of the student."""
    inner: nn.Module | None = model
    while isinstance(inner, nn.Module):
        if _is_a(inner, ("torch", "DistributedDataParallel")):
            return True
        inner = _wrapped_by(inner)
    return False


def _wrapped_by(model: nn.Module) -> nn.Module | None:
    for known, attribute in _WRAPPERS.items():
        if _is_a(model, known):
            inner = getattr(model, attribute, None)
            return inner if isinstance(inner, nn.Module) else None
    return None


def _is_a(model: nn.Module, known: tuple[str, str]) -> bool:
    package, name = known
    return any(
        base.__name__ == name and base.__module__.split(".")[0] == package
        for base in type(model).__mro__
    )
