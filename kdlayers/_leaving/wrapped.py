"""Finds the student inside the wrappers of a training loop."""

from torch import nn

from kdlayers._models.wrappers import sharded
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


def refuse_wrapped(model: nn.Module) -> None:
    """Raise AttachError if parameters added to ``model`` now would not be synchronised."""
    if is_ddp(model) or (isinstance(model, nn.Module) and sharded(model)):
        wrapper = "DistributedDataParallel" if is_ddp(model) else "FSDP"
        raise AttachError(
            f"the model is wrapped in {wrapper} already, which would not synchronise the "
            "parameters of the KD layers; call load_student(model, path) first, then wrap the model"
        )


def is_first_process(model: nn.Module) -> bool:
    """Whether this process writes the file: the first one if ``model`` is spread over several."""
    for parameter in model.parameters():
        if type(parameter).__name__ == "DTensor":
            coordinate = parameter.device_mesh.get_coordinate()  # type: ignore[attr-defined]
            return coordinate is not None and not any(coordinate)
    return True


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
