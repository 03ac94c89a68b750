"""The attention that turns softened teacher logits into student-friendly ones."""

import torch
from torch import Tensor, nn

from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision, linear


class AttentionSimplifier(nn.Module):
    r"""The attention of student-friendly distillation (Yuan, Lang, Quan, 2023), on one sample.

    .. math::
        q, k, v = W_q x + b_q,\; W_k x + b_k,\; W_v x + b_v \in \mathbb{R}^d, \qquad
        u = x + W_o \, \mathrm{softmax}(q k^\top) \, v + b_o

    It is computed from the features of a sample's softened logits :math:`x`, and added to them. The
    softmax runs over the last axis of the d x d matrix. :math:`W_o` and :math:`b_o` start at zero,
    so that :math:`u = x` at first; the other layers have PyTorch's initialisation. Samples do not
    mix. Everything is computed in float32 or better.

    **A reconstruction**: the summary of student-friendly distillation names an attention and
    softened logits; the layout, the residual and the initialisation are our choices.

    Args:
        num_classes: K, at least 2.
        width: d. Default ``min(K, 128)``; memory grows with batch x d x d.
        residual: add :math:`x`. Default True. Without it the result starts at 0, and copies the
            student more easily.

    Raises:
        ArgumentError: if ``num_classes`` is below 2 or ``width`` below 1.
        ArgumentTypeError: if one of them is not an integer; at the call, if ``x`` is not a
            floating-point tensor.

    Example:
        >>> import torch
        >>> softened = torch.tensor([[1.5, 0.25, -0.5]])
        >>> AttentionSimplifier(3)(softened).detach()
        tensor([[ 1.5000,  0.2500, -0.5000]])
    """

    def __init__(
        self, num_classes: int, width: int | None = None, *, residual: bool = True
    ) -> None:
        super().__init__()
        check.count("num_classes", num_classes, least=2)
        width = check.count("width", min(num_classes, 128) if width is None else width)
        self.query = nn.Linear(num_classes, width)
        self.key = nn.Linear(num_classes, width)
        self.value = nn.Linear(num_classes, width)
        self.output = nn.Linear(width, num_classes)
        self.residual = residual
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, K]`` softened logits to ``[B, K]`` simplified ones."""
        check.floats("x", x)
        query, key, value = (
            linear(x, layer.weight, layer.bias) for layer in (self.query, self.key, self.value)
        )
        simplified = linear(_attend(query, key, value), self.output.weight, self.output.bias)
        return x + simplified if self.residual else simplified


@full_precision
def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query[:, :, None] * key[:, None, :]
    return torch.bmm(scores.softmax(dim=-1), value[:, :, None])[:, :, 0]
