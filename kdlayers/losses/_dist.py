"""DIST: correlation with the teacher's probabilities, as a loss."""

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import dist
from kdlayers.losses._base import LogitLoss, Weight


class DISTLoss(LogitLoss):
    r"""DIST: distillation from a stronger teacher (Huang, You, Wang, Qian, Xu, NeurIPS 2022).

    .. math:: L = T^2 \big( \beta \, L_\mathrm{inter} + \gamma \, L_\mathrm{intra} \big)

    Each term is one minus Pearson's correlation of the student's and the teacher's probabilities:
    over the classes of a sample (inter), and over the samples of a class (intra). See
    :func:`kdlayers.functional.dist`. The loss does not depend on the scale of the probabilities,
    which helps if the teacher is much stronger than the student. It needs no labels.

    Args:
        beta: weight of the inter-class relation, 0 or more. Default 1, as in the authors' code.
        gamma: weight of the intra-class relation, 0 or more. Default 1, as in the authors' code.
        temperature: above 0. Default 1, as in the authors' code.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`.

    Raises:
        ArgumentError: if a number is out of range.
        ArgumentTypeError: if one of them is not a number.
        ShapeError: at the call, if the tensors are not logits of one shape ``[B, K]``, or ``gamma``
            is above 0 and the batch holds one sample.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[6.0, 1.0, -2.0], [0.0, 3.0, 1.0]])
        >>> DISTLoss()(student, teacher)
        tensor(0.0095)
    """

    def __init__(
        self,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 1.0,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        self.beta = check.not_negative("beta", beta)
        self.gamma = check.not_negative("gamma", gamma)
        self.temperature = check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The weighted sum for logits ``[B, K]``; the labels are not used."""
        return dist(
            student, teacher, beta=self.beta, gamma=self.gamma, temperature=self.temperature
        )

    def extra_repr(self) -> str:
        """Shows beta, gamma, temperature, weight and at."""
        numbers = f"beta={self.beta}, gamma={self.gamma}, temperature={self.temperature}"
        return f"{numbers}, {super().extra_repr()}"
