"""Regression of a teacher's features, between models of any kind."""

from typing import ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from kdlayers._models.undisturbed import undisturbed
from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision, work_dtype
from kdlayers.functional._features import Distance, feature_distance
from kdlayers.losses._base import DistillLoss, Weight
from kdlayers.losses._projector import make_projector, projector_like, widths
from kdlayers.losses._reading import read_maps, read_vectors
from kdlayers.losses._teacher_norm import TeacherNorm

Tokens: TypeAlias = Literal["patch", "cls", "pooled"]


class FeatureLoss(DistillLoss):
    r"""The teacher's features from the student's, through a train-only projector.

    .. math:: L = \frac{1}{N} \sum_{n=1}^{N} d\big( r(f^S_n), \, \tilde f^T_n \big)

    over the :math:`N` positions of the batch, with the projector :math:`r`, and :math:`\tilde f^T`
    the teacher's features, standardised or as they are. Between maps of a convolutional network,
    tokens of a transformer and vectors, in every direction; no labels are needed. Maps of different
    size are compared on the smaller grid, the larger one average-pooled. The teacher is detached.
    The projector is in :meth:`parameters` for the optimiser and never in the exported student.

    Args:
        distance: ``"cosine"``, 1 minus the cosine over channels (default: it needs no weight that
            fits the size of the features); ``"mse"``, the mean squared difference over all
            elements; or ``"smooth_l1"``, which is linear above a difference of 1.
        projector: ``"linear"`` (default), a linear layer with bias from the student's to the
            teacher's channels; ``"mlp"``, one with a hidden layer of the teacher's width and GELU;
            ``None`` where the widths are equal; or a module of your own. It gets maps
            ``[B, C, H, W]`` with ``tokens="patch"``, and vectors ``[B, C]`` otherwise.
        tokens: ``"patch"`` (default), every position, without class tokens and registers;
            ``"cls"``, the class token, where a model without one gives the mean over its positions;
            ``"pooled"``, the mean over positions on both sides.
        normalize_teacher: give every channel of the teacher's features mean 0 and variance 1, by
            the statistics of all batches so far, so that several teachers or points weigh alike.
            Default False.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; ``at=None`` compares
            the models' outputs.

    Raises:
        ArgumentError: if an option is unknown; in ``attach_kd``, if class tokens are asked for and
            neither point has one.
        ShapeError: at the call, if the tensors are not features of the same images, or the
            projector does not give the teacher's width.

    References:
        Regression of features: Romero et al., "FitNets", ICLR 2015. Cosine distance and
        standardised features, for teachers that are foundation models: Ranzinger, Heinrich, Kautz,
        Molchanov, "AM-RADIO", CVPR 2024.

    Example:
        >>> import torch
        >>> loss = FeatureLoss(at=("layer4", "blocks.11"))
        >>> value = loss(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4))
        >>> loss.projector.weight.shape
        torch.Size([16, 8, 1, 1])
    """

    detaches_teacher: ClassVar[bool] = True
    slot: ClassVar[str] = "projector"
    """Attribute that holds the projector."""
    teacher_norm: TeacherNorm | None

    def __init__(
        self,
        *,
        distance: Distance = "cosine",
        projector: str | nn.Module | None = "linear",
        tokens: Tokens = "patch",
        normalize_teacher: bool = False,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        check.one_of("distance", distance, get_args(Distance))
        check.one_of("tokens", tokens, get_args(Tokens))
        if projector is not None and not isinstance(projector, nn.Module):
            check.one_of("projector", projector, ("linear", "mlp", "None", "a module"))
        self.distance: Distance = distance
        self.tokens = tokens
        self.normalize_teacher = normalize_teacher
        self.projector_kind = None if isinstance(projector, nn.Module) else projector
        self.register_module(self.slot, projector if isinstance(projector, nn.Module) else None)
        self.teacher_norm = None

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make what depends on the widths, and try a projector of the user's own."""
        student, teacher = self._read(student, teacher)
        self._make(student, teacher)
        if self.projector_kind is None:
            self.to(student.device)
            with undisturbed(self), torch.no_grad():
                self._project(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean distance for maps, vectors ``[B, C]`` or tokens; the labels are not used."""
        student, teacher = self._read(student, teacher)
        teacher = teacher.detach()
        self._make(student, teacher)
        dim = _channel_dim(teacher)
        projected = self._project(student, teacher)
        if self.teacher_norm is not None:
            teacher = self.teacher_norm(teacher, dim)
        return feature_distance(projected, teacher, self.distance, dim)

    def _read(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both as features of one grid."""
        if self.tokens == "patch":
            return read_maps(student, teacher)
        return read_vectors(student, teacher, class_token=self.tokens == "cls")

    @property
    def _projector(self) -> nn.Module | None:
        found: nn.Module | None = getattr(self, self.slot)
        return found

    def _make(self, student: Tensor, teacher: Tensor) -> None:
        ours, theirs = (t.shape[_channel_dim(t)] for t in (student, teacher))
        if self._projector is None and self.projector_kind is not None:
            made = make_projector(self.projector_kind, ours, theirs, maps=student.dim() == 4)
            setattr(self, self.slot, made.to(student.device, work_dtype(student)))
        if self.normalize_teacher and self.teacher_norm is None:
            self.teacher_norm = TeacherNorm(theirs, work_dtype(teacher), teacher.device)

    def _build_from(self, state: dict[str, Tensor]) -> None:
        if self._projector is None and self.projector_kind is not None:
            made = projector_like(state, self.slot)
            if made is not None:
                setattr(self, self.slot, made)
        saved = state.get("teacher_norm.mean")
        if self.teacher_norm is None and self.normalize_teacher and saved is not None:
            self.teacher_norm = TeacherNorm(len(saved), saved.dtype, saved.device)

    @full_precision
    def _project(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The student's features with the teacher's width."""
        projector, kind = self._projector, type(self).__name__
        if projector is not None and self.projector_kind is not None:
            found = widths(projector)
            if found != tuple(t.shape[_channel_dim(t)] for t in (student, teacher)):
                ours, theirs = found or (0, 0)
                raise ShapeError(
                    f"this {kind} maps {ours} to {theirs} channels, got {check.shape(student)} and "
                    f"{check.shape(teacher)}; use one {kind} for each point"
                )
        projected: Tensor = student if projector is None else projector(student)
        if projected.shape != teacher.shape:
            raise ShapeError(
                f"the projector of {kind} must give the teacher's shape {check.shape(teacher)}, it "
                f"made {check.shape(projected)} of {check.shape(student)}"
                + ('; pass projector="linear"' if projector is None else "")
            )
        return projected

    def extra_repr(self) -> str:
        """Shows the options besides weight and at."""
        return f"distance={self.distance!r}, tokens={self.tokens!r}, {super().extra_repr()}"


def _channel_dim(features: Tensor) -> int:
    return -1 if features.dim() == 3 else 1
