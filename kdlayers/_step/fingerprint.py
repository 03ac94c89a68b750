"""Checksums of the teachers' weights, which say whether a teacher is the one that was saved."""

from collections.abc import Sequence

from torch import Tensor, nn

from kdlayers._models.wrappers import flattened, sharded
from kdlayers._step.recorded_teacher import AbsentModel
from kdlayers._step.teacher import Teacher
from kdlayers._utils.checksums import checksum
from kdlayers._utils.warn import warn


def weights_hash(model: nn.Module) -> str:
    """The checksum of a model's parameters and buffers, with their names."""
    if isinstance(model, AbsentModel):
        return model.weights
    state = model.state_dict()
    # A checksum refuses expanded tensors, which a damaged file may hold; a model may have them.
    return checksum({k: v.contiguous() if isinstance(v, Tensor) else v for k, v in state.items()})


def fingerprints(teachers: Sequence[Teacher]) -> list[str | None]:
    """The hash of each teacher; None for a peer, which learns, and for a sharded teacher."""
    return [None if _unknown(teacher) else weights_hash(teacher.model) for teacher in teachers]


def _unknown(teacher: Teacher) -> bool:
    return flattened(teacher.model) or sharded(teacher.model) or not teacher.eval_mode


def warn_of_others(teachers: Sequence[Teacher], saved: Sequence[object]) -> None:
    """Warn if the handle's teachers are not those whose fingerprints were saved."""
    if len(saved) != len(teachers):
        warn(
            f"the state was saved with {len(saved)} teachers, but this handle has {len(teachers)}; "
            "attach the teachers of the first run to continue it unchanged"
        )
        return
    known = zip(fingerprints(teachers), saved, strict=True)
    others = [i for i, (ours, theirs) in enumerate(known) if ours and theirs and ours != theirs]
    for index in others:
        name = type(teachers[index].model).__name__
        warn(
            f"the weights of teacher {index} ({name}) are not those that the state was saved with: "
            "load the teacher's weights before kd.load_state_dict(...), or, if you changed the "
            "teacher on purpose, fit again: kd.fit(loader, refit=True)"
        )
