"""Inner products of all pairs of rows."""

from typing import Any

import torch
from torch import Tensor


class _Gram(torch.autograd.Function):
    """``rows @ rows.T``, with one matrix product in its backward where autograd needs two."""

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows @ rows.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:  # noqa: ARG004
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (rows,), (gradient,) = ctx.saved_tensors, grad_outputs
        # Both factors are the same rows, so their two gradients share this factor.
        into_rows: Tensor = (gradient + gradient.mT) @ rows
        return into_rows

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Tensor) -> Tensor:
        (rows,), (tangent,) = ctx.saved_tensors, grad_inputs
        half = tangent @ rows.mT
        both: Tensor = half + half.mT
        return both


def gram(rows: Tensor) -> Tensor:
    """``[B, B]``: the inner products of all pairs of the rows ``[B, D]``."""
    # Dynamo does not trace functions that define forward-mode derivatives.
    products: Tensor = rows @ rows.mT if torch.compiler.is_compiling() else _Gram.apply(rows)
    return products
