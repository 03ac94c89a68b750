r"""Fused KL divergence from soft assignments, with its gradient, in chunks of rows.

The soft assignments are never stored. The gradient for the scores is softmax(a) - q. The forward
pass has both, so it also computes the gradient, and the backward pass only scales it. If the scores
are not stored either, the gradient is propagated at once to the unit vectors and the templates.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdlayers._targets.distances import (
    affine,
    balanced,
    mixed_rows,
    one_hot_of_largest,
    rows_of,
)
from kdlayers._utils.chunks import add_product, chunks
from kdlayers.functional._checks import work_dtype

Assign = Callable[[slice], tuple[Tensor, Tensor]]
"""Soft assignment q of a slice of rows ``[n, K]``, and the sum of q log q of each ``[n]``."""
Three = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("kdlayers::codebook_divergence", mutates_args=())
def codebook_divergence(
    student: Tensor,
    templates: Tensor | None,
    features: Tensor,
    centers: Tensor,
    sharpness: float | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean divergence of template scores from the soft assignment of features to centres.

    Args:
        student: scores ``[N, K]``; with ``templates`` the unit vectors ``[N, C]``.
        templates: ``[K, C]``; the scores are their products with the unit vectors.
        features: the teacher's features ``[N, D]``, float32 or float64.
        centers: ``[K, D]``, in the dtype of ``features``.
        sharpness: factor of the squared distances; ``None`` for one-hot assignments.
        need_grad: whether to compute the gradients for the backward pass.

    Returns:
        The mean over rows, and N times its gradients for ``student`` and ``templates``. Gradients
        are empty tensors if nothing needs them.
    """
    with torch.autocast(student.device.type, enabled=False):
        features, centers, bias = balanced(features, centers)
        scale = 1.0 if sharpness is None else 2 * sharpness
        centers, bias = centers * scale, bias * scale

        def assign(part: slice) -> tuple[Tensor, Tensor]:
            logits = affine(features[part], centers, bias)
            if sharpness is None:
                hot = one_hot_of_largest(logits)
                return hot, hot.new_zeros(len(hot))
            shifted = logits.sub_(logits.amax(dim=1, keepdim=True))
            shares = shifted.softmax(dim=1)
            # The largest share is exp(0) / sum, so its logarithm is the log of the normaliser.
            return shares, shifted.mul_(shares).sum(dim=1) + shares.amax(dim=1).log()

        return _divergence(student, templates, assign, need_grad)


@torch.library.custom_op("kdlayers::decision_divergence", mutates_args=())
def decision_divergence(
    student: Tensor,
    templates: Tensor | None,
    own: Tensor,
    decisions: Tensor,
    shares: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Like `codebook_divergence`; the assignment is a row of the decisions, or a mean of rows."""
    sums = decisions if shares is not None else torch.xlogy(decisions, decisions).sum(dim=1)

    def assign(part: slice) -> tuple[Tensor, Tensor]:
        if shares is not None:
            mixed = mixed_rows(decisions, own[part], shares[part])
            return mixed, torch.xlogy(mixed, mixed).sum(dim=1)
        return rows_of(decisions, own[part]), sums.index_select(0, own[part].clamp(min=0))

    with torch.autocast(student.device.type, enabled=False):
        return _divergence(student, templates, assign, need_grad)


@torch.library.custom_op("kdlayers::scale_gradient", mutates_args=())
def scale_gradient(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``grad * factor`` as an operator without a derivative, so that double backward raises."""
    return (grad * factor).to(dtype, copy=True)


def _divergence(
    student: Tensor, templates: Tensor | None, assign: Assign, need_grad: bool
) -> Three:
    grads = _empty_grads(student, templates, need_grad)
    k = student.shape[1] if templates is None else len(templates)
    totals = []
    for part in chunks(len(student), k, student.device):
        scores = student[part] if templates is None else student[part] @ templates.T
        shares, negative_entropy = assign(part)
        shifted = scores.to(shares.dtype) - scores.amax(dim=1, keepdim=True)
        softmax = shifted.softmax(dim=1)
        cross_entropy = -softmax.amax(dim=1).log() - shifted.mul_(shares).sum(dim=1)
        totals.append((negative_entropy + cross_entropy).sum())
        if need_grad:
            grad = softmax.sub_(shares).to(student.dtype)
            grads[0][part] = grad if templates is None else grad @ templates
            if templates is not None:
                add_product(grads[1], grad.T, student[part])
    return torch.stack(totals).sum() / len(student), *grads


def _empty_grads(
    student: Tensor, templates: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor]:
    if not need_grad:
        return student.new_empty(0), student.new_empty(0)
    if templates is None:
        return torch.empty_like(student), student.new_empty(0)
    work = work_dtype(student)
    return torch.empty_like(student, dtype=work), torch.zeros_like(templates, dtype=work)


def needs_grad(student: Tensor, templates: Tensor | None) -> bool:
    """Whether a backward pass may follow."""
    wanted = student.requires_grad or (templates is not None and templates.requires_grad)
    return torch.is_grad_enabled() and wanted


def _fake(student: Tensor, templates: Tensor | None, *rest: Any) -> Three:
    # rest[1] is the centres or the decisions.
    return rest[1].new_empty(()), *_empty_grads(student, templates, rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Three) -> None:
    student, templates = inputs[:2]
    ctx.arguments = len(inputs)
    ctx.rows, ctx.dtype, ctx.has_templates = len(student), student.dtype, templates is not None
    ctx.save_for_backward(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: object) -> tuple[Any, ...]:
    factor = grad / ctx.rows
    for_student, for_templates = ctx.saved_tensors
    student = scale_gradient(for_student, factor, ctx.dtype)
    templates = scale_gradient(for_templates, factor, ctx.dtype) if ctx.has_templates else None
    return student, templates, *[None] * (ctx.arguments - 2)


scale_gradient.register_fake(lambda grad, _, dtype: torch.empty_like(grad, dtype=dtype))
for _operator in (codebook_divergence, decision_divergence):
    _operator.register_fake(_fake)
    _operator.register_autograd(_backward, setup_context=_setup)
