"""Regression of a teacher's features, between models of any kind."""

from typing import get_args

from torch import Tensor, nn

from kdlayers.functional import _checks as check
from kdlayers.functional._features import Distance, channel_dim, feature_distance
from kdlayers.losses._base import Weight
from kdlayers.losses._projected import ProjectedLoss
from kdlayers.losses._reading import Tokens, alike


class FeatureLoss(ProjectedLoss):
    r"""Predicts the teacher's features from the student's, with a train-only projector.

    .. math:: L = \frac{1}{N} \sum_{n=1}^{N} d\big( r(f^S_n), \, \tilde f^T_n \big)

    over the :math:`N` positions of a batch, with the distance :math:`d`, the projector :math:`r`
    and the teacher's features :math:`\tilde f^T`, standardised or not. It compares maps
    ``[B, C, H, W]`` on the smaller grid, tokens and vectors ``[B, C]``. The teacher is detached.

    Args:
        distance: ``"cosine"`` (default), one minus the cosine, which does not depend on the scale;
            ``"mse"``; or ``"smooth_l1"``, linear above a difference of 1.
        projector: ``"linear"`` (default), with a bias; ``"mlp"``, with a hidden GELU layer of the
            teacher's width; ``None`` for equal widths; or a module. Never in the exported student.
        tokens: ``"patch"`` (default), all positions except class tokens and registers; ``"cls"``,
            the class token, or the mean if a model has none; ``"pooled"``, the mean in both models.
        normalize_teacher: standardise the teacher's channels over all batches so far. Default
            False.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; ``at=None`` compares
            the models' outputs. The default weight of 1 is our choice; added to cross-entropy, the
            cosine distance may need 10 to 100.

    Raises:
        ArgumentError: if an option is unknown, or neither point has the class token.
        ShapeError: at the call, if the tensors are not of the same images, or the projector's width
            is wrong.

    References:
        Romero et al., "FitNets", ICLR 2015; cosines, standardised features: Ranzinger et al., 2024.

    Example:
        >>> import torch
        >>> FeatureLoss(projector=None)(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]]))
        tensor(0.2929)
    """

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
        self._hold(projector)
        self.distance: Distance = distance
        self.tokens = tokens
        self.normalize_teacher = normalize_teacher

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean distance for maps, vectors ``[B, C]`` or tokens; the labels are not used."""
        if self._direct() and alike(student, teacher):  # checks would take longer than the distance
            return feature_distance(student, teacher.detach(), self.distance)
        student, teacher = self._ready(student, teacher)
        projected = self._projected(student, teacher)
        if self.teacher_norm is not None:
            teacher = self.teacher_norm(teacher, channel_dim(teacher))
        return feature_distance(projected, teacher.detach(), self.distance)

    def extra_repr(self) -> str:
        """Shows distance, tokens, weight and at."""
        return f"distance={self.distance!r}, tokens={self.tokens!r}, {super().extra_repr()}"
