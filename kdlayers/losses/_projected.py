"""Base of losses that compare the teacher's features with projected features of the student."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlayers._models.undisturbed import undisturbed
from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision, work_dtype
from kdlayers.functional._features import channel_dim
from kdlayers.losses._base import DistillLoss
from kdlayers.losses._projector import check_kind, make_projector, projector_like, widths
from kdlayers.losses._reading import read
from kdlayers.losses._teacher_norm import TeacherNorm, norm_for, norm_like


class ProjectedLoss(DistillLoss):
    """A loss whose student features pass a train-only projector to the teacher's width.

    A subclass calls `_hold` in its constructor. Its forward calls `_ready`, then `_projected`.
    """

    detaches_teacher: ClassVar[bool] = True
    slot: ClassVar[str] = "projector"
    """Attribute that holds the projector."""
    bias: ClassVar[bool] = True
    """Whether a linear projector has a bias."""
    projector_kind: str | None
    """``"linear"``, ``"mlp"``, or None for a module of the user's or none."""
    normalize_teacher: bool = False
    teacher_norm: TeacherNorm | None

    def _hold(self, projector: str | nn.Module | None) -> None:
        """Keep the user's projector, or note which kind to make."""
        if projector is not None and not isinstance(projector, nn.Module):
            check_kind(projector)
        own = projector if isinstance(projector, nn.Module) else None
        self.projector_kind = None if isinstance(projector, nn.Module) else projector
        self.register_module(self.slot, own)
        self.teacher_norm = None

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the projector for these widths, or try the user's own."""
        student, teacher = self._ready(student, teacher)
        if self.projector_kind is None:
            # As the first step would: a float64 student trains a float64 projector.
            self.to(student.device, torch.float64 if student.dtype == torch.float64 else None)
            with undisturbed(self), torch.no_grad():
                self._projected(student, teacher)

    def _ready(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both tensors from `_read`; makes projector and norm if they do not exist yet."""
        student, teacher = self._read(student, teacher)
        self._make(student, teacher)
        if self.normalize_teacher and self.teacher_norm is None:
            self.teacher_norm = norm_for(teacher, channel_dim(teacher))
        return student, teacher

    def _read(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both tensors as they are compared: on one grid, with channels in `channel_dim`."""
        return read(student, teacher, self.tokens)

    def _direct(self) -> bool:
        """Whether tensors of one shape are compared as they are."""
        projects = self.projector_kind is not None or getattr(self, self.slot) is not None
        return not (projects or self.normalize_teacher) and self.tokens == "patch"

    def _make(self, student: Tensor, teacher: Tensor) -> None:
        """Make the projector, if it is still to be made."""
        if self.projector_kind is None or getattr(self, self.slot) is not None:
            return
        ours, theirs = (t.shape[channel_dim(t)] for t in (student, teacher))
        maps = student.dim() == 4
        made = make_projector(self.projector_kind, ours, theirs, maps=maps, bias=self.bias)
        setattr(self, self.slot, made.to(student.device, work_dtype(student)))

    def _build_from(self, state: dict[str, Tensor]) -> None:
        if self.projector_kind is not None and getattr(self, self.slot) is None:
            setattr(self, self.slot, projector_like(state, self.slot))
        if self.normalize_teacher and self.teacher_norm is None:
            self.teacher_norm = norm_like(state, "teacher_norm")

    @full_precision
    def _projected(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's features with the teacher's width."""
        projector: nn.Module | None = getattr(self, self.slot)
        kind = type(self).__name__
        if projector is not None and self.projector_kind is not None:
            ours, theirs = widths(projector) or (0, 0)
            if (ours, theirs) != tuple(t.shape[channel_dim(t)] for t in (student, teacher)):
                raise ShapeError(
                    f"this {kind} maps {ours} to {theirs} channels, got {check.shape(student)} and "
                    f"{check.shape(teacher)}; use one {kind} for each point"
                )
        projected: Tensor = student if projector is None else projector(student)
        if projected.shape != teacher.shape:
            raise ShapeError(
                f"the projector of {kind} must return the teacher's shape {check.shape(teacher)}, "
                f"but returned {check.shape(projected)} for {check.shape(student)}"
                + ('; pass projector="linear"' if projector is None else "")
            )
        return projected
