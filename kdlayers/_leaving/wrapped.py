"""Wrapped students: which cannot be loaded into, and which process writes the file."""

from torch import nn

from kdlayers._models.wrappers import is_ddp, sharded
from kdlayers.errors import AttachError


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
