"""The base class of every distillation loss."""

from collections.abc import Callable
from math import inf
from numbers import Integral, Real
from typing import Any, ClassVar, TypeAlias

from torch import Tensor, nn

from kdlayers._targets.fitter import Fitter
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.functional import _checks as check

Weight: TypeAlias = float | Callable[[int], float]


class DistillLoss(nn.Module):
    r"""Base class: one term of the loss, comparing a student's tensor with the teacher's.

    A subclass implements :meth:`forward` and works on bare tensors as well as through
    :func:`kdlayers.attach_kd`, which finds the tensors, calls the loss and applies ``weight``:

    .. math:: L = \sum_i w_i(\text{step}) \; L_i(\text{student}_i, \text{teacher}_i, y)

    Args:
        weight: factor of this term in :meth:`kdlayers.KDHandle.loss`: a number, or a function of
            the step (an int that starts at 0 and counts calls of ``loss``). A loss that you call
            directly returns its value without the weight. With weight 0 it is still computed, so
            that its parameters get a gradient of 0 on all ranks. Default 1.
        at: what the loss compares. ``None``: the logits. A name: the outputs of the student's and
            the teacher's module of that name. A pair: (student's name, teacher's name).
        name: key of this term in ``kd.terms``; by default made from the class and ``at``.
        teacher_index: index of the teacher to learn from if ``attach_kd`` got several. Default: the
            mean of their logits, or the features of the first.

    Raises:
        ArgumentError: if ``weight`` is negative, ``teacher_index`` is not an index, or ``at`` is
            neither a name nor a pair of names.
        ArgumentTypeError: if ``weight`` is neither a number nor callable.

    Example:
        >>> import torch
        >>> from kdlayers import DistillLoss
        >>> class LogitMSE(DistillLoss):
        ...     def forward(self, student, teacher, targets=None):
        ...         return (student - teacher).square().mean()
        >>> LogitMSE(weight=0.5)(torch.zeros(2, 3), torch.ones(2, 3))
        tensor(1.)
    """

    detaches_teacher: ClassVar[bool] = False
    """Whether the teacher's tensor gets no gradient, even if it requires one."""

    on_logits: ClassVar[bool] = False
    """Whether it takes class scores ``[B, K]``, not maps, if ``at`` names a classifier."""

    tokens: str = "patch"
    """What it reads if ``at`` names a point: ``"patch"``, the grid of positions as maps ``[B, C, H,
    W]``; ``"cls"``, the class token; ``"pooled"``, the mean over the grid. The last two are vectors
    ``[B, C]``; a model without a class token gives its mean for ``"cls"``."""

    metric_names: tuple[str, ...] = ()
    """Names that :meth:`metrics` may return, so that no other term can use them."""

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__()
        pair = isinstance(at, tuple) and len(at) == 2 and all(isinstance(n, str) for n in at)
        if at is not None and not isinstance(at, str) and not pair:
            raise ArgumentError(
                f"at must be None (logits), a module name or a (student, teacher) pair, got {at!r}"
            )
        if teacher_index is not None:
            teacher_index = check_index(teacher_index)
        self.weight = check_weight(weight)
        self.at = at
        self.name = name
        self.teacher_index = teacher_index
        self._metrics: dict[str, Tensor] = {}

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """Value of the term, a scalar: the student's tensor, the teacher's, the labels."""
        raise NotImplementedError(
            f"{type(self).__name__} has no forward(student, teacher, targets)"
        )

    def weight_at(self, step: int) -> float:
        """The weight at ``step``, the number of earlier ``loss`` calls.

        Raises:
            ArgumentError: if a function of the step returns no finite number of 0 or more.
            ArgumentTypeError: if it returns no number.
        """
        given = self.weight(step) if callable(self.weight) else self.weight
        try:
            weight = float(given)
        except (TypeError, ValueError, RuntimeError):  # the last is torch's, for several elements
            raise ArgumentTypeError(
                f"{self._weight_of(step)} must be a number, got {type(given).__name__}"
            ) from None
        if not 0 <= weight < inf:
            raise ArgumentError(
                f"{self._weight_of(step)} must be 0 or more and finite, got {weight}; for a "
                "function that falls below 0 return max(0.0, value)"
            )
        return weight

    def _weight_of(self, step: int) -> str:
        point = self.at[0] if isinstance(self.at, tuple) else self.at
        own = type(self).__name__ if point is None else f"{type(self).__name__}.{point}"
        return f"the weight of {self.name or own} at step {step}"

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the parameters whose shapes depend on the tensors; by default there are none.

        ``attach_kd`` calls this once with tensors of a dry run, so that an optimiser made
        afterwards sees every parameter. The losses of kdlayers also call it in their first
        :meth:`forward`. If you use your own loss without ``attach_kd``, call it yourself.

        Args:
            student: a tensor as :meth:`forward` gets it.
            teacher: likewise.
        """

    def fitter(self, *, seed: int = 0) -> Fitter | None:  # noqa: ARG002
        """What ``kd.fit`` must feed before this loss can be used; ``None`` if nothing is fitted."""
        return None

    @property
    def fitted(self) -> bool:
        """Whether ``kd.fit`` has fitted this loss; True for losses without a fitter."""
        return True

    def metrics(self) -> dict[str, Tensor]:
        """Detached values of the last forward by name, which ``kd.terms`` reports with the term."""
        return dict(self._metrics)

    def _record(self, **values: Tensor) -> None:
        """Keep ``values`` for :meth:`metrics`."""
        self._metrics = {name: value.detach() for name, value in values.items()}

    def _build_from(self, state: dict[str, Tensor]) -> None:
        """Create the parameters that ``state`` has, if the loss is not built yet."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        own = {key[len(prefix) :]: v for key, v in state_dict.items() if key.startswith(prefix)}
        self._build_from(own)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Shows weight and at in the printed module."""
        return f"weight={self.weight!r}, at={self.at!r}"


def check_weight(weight: Weight) -> Weight:
    """``weight`` if it is a finite number of 0 or more, or a function."""
    if callable(weight):
        return weight
    if isinstance(weight, bool) or not isinstance(weight, Real):
        raise ArgumentTypeError(
            f"weight must be a number or a function of the step, got {type(weight).__name__}"
        )
    return check.not_negative("weight", weight)


def check_index(index: object) -> int:
    """``index`` as an int; raise unless it can be the index of a teacher."""
    if isinstance(index, bool) or not isinstance(index, Integral) or index < 0:
        raise ArgumentError(f"teacher_index counts the teachers from 0, got {index!r}")
    return int(index)


class LogitLoss(DistillLoss):
    """A loss on logits ``[B, K]``, of the models or of auxiliary classifiers."""

    on_logits: ClassVar[bool] = True

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check the shapes of a dry run, so that wrong use fails before training."""
        if isinstance(student, Tensor) and student.dim() == 4:
            raise ShapeError(
                f"{type(self).__name__} compares logits [batch, classes], but it would get maps "
                f"{check.shape(student)}, as segmentation and detection models return: use KDLoss "
                "or ChannelWiseLoss for class maps, KD layers (at=...) or losses on features, such "
                "as FitNetLoss(at=...)"
            )
        if isinstance(student, Tensor) and student.dim() == 3:
            raise ShapeError(
                f"{type(self).__name__} compares logits [batch, classes], but it would get "
                f"{check.shape(student)}: scores of the queries of a detector, which two models "
                "order differently, or tokens of an encoder without a head; use KD layers (at=...) "
                "or losses on features, such as FitNetLoss(at=...), in the backbone or the encoder"
            )
        check.floats("student", student)
        check.floats("teacher", teacher)
        if student.dim() == teacher.dim() == 2 and student.shape[1] != teacher.shape[1]:
            raise ShapeError(
                f"{type(self).__name__} compares logits of the same classes, but the student's are "
                f"{check.shape(student)} and the teacher's {check.shape(teacher)}: with different "
                "numbers of classes use KD layers (at=...) or losses on features, such as "
                "FitNetLoss(at=...)"
            )
        check.logits(student, teacher)
