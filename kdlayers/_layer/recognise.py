r"""The KD layer's arithmetic on rows, in chunks that stay in the cache.

The plain operations create about six tensors of N positions by K templates in the forward pass, and
as many in the backward pass. Here the scores are the only one, and where they are cheap to
recompute even they are not stored. This is possible because the scores are linear in the unit
vectors u:

* their mean and variance over positions follow from the mean and the covariance of u, and
* what the batch norm's gradient subtracts from every position's gradient is linear in u too, hence
  a product with a C x C matrix.
"""

from typing import Any

import torch
from torch import Tensor

from kdlayers._utils.chunks import add_product, chunks
from kdlayers._utils.norms import inverse, inverse_norm
from kdlayers.functional._checks import work_dtype

Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("kdlayers::recognise", mutates_args=())
def recognise(
    units: Tensor,
    templates: Tensor,
    gamma: Tensor,
    beta: Tensor,
    values: Tensor,
    eps: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""Scores, batch norm with the batch's statistics, ReLU, and the normalised value product.

    .. math:: a = u M^\top, \quad p = \operatorname{ReLU}(\gamma \hat a + \beta), \quad
              v = p V^\top / \lVert p \rVert

    Args:
        units: u, unit vectors of the positions, ``[N, C]``.
        templates: M, unit templates times the scale, ``[K, C]``, of the dtype of ``units``.
        gamma: weight of the batch norm, ``[K]``, float32 or better.
        beta: its bias, ``[K]``.
        values: V, unit rows times the scale, ``[C, K]``, of the dtype of ``units``.
        eps: of the batch norm.
        keep: whether to store the scores instead of recomputing them.

    Returns:
        v ``[N, C]``, a ``[N, K]`` (``[0, K]`` unless ``keep``), the scores' mean and biased
        variance ``[K]``, and the norms of p ``[N]``.
    """
    with torch.autocast(units.device.type, enabled=False):
        n, k = len(units), len(templates)
        scores = units @ templates.T if keep else units.new_empty(0, k)
        mean, variance = _moments(units, templates, scores if keep else None)
        recognised = _Recognised(
            units, templates, gamma, beta, mean, variance + eps, scores if keep else None
        )
        value, norms = units.new_empty(n, len(values)), mean.new_empty(n)
        for part in chunks(n, k, units.device):
            assigned = recognised[part]
            norms[part] = torch.linalg.vector_norm(assigned, dim=1)
            product = assigned.to(values.dtype) @ values.T
            value[part] = product * inverse(norms[part]).unsqueeze(1)
    return value, scores, mean, variance, norms


@recognise.register_fake
def _(
    units: Tensor,
    templates: Tensor,
    gamma: Tensor,  # noqa: ARG001  # the signature is the operator's
    beta: Tensor,  # noqa: ARG001
    values: Tensor,
    eps: float,  # noqa: ARG001
    keep: bool,
) -> Five:
    n, k = units.shape[0], templates.shape[0]
    scores = units.new_empty(n if keep else 0, k)
    mean = units.new_empty(k, dtype=work_dtype(units))
    value, norms = units.new_empty(n, values.shape[0]), mean.new_empty(n)
    return value, scores, mean, torch.empty_like(mean), norms


@torch.library.custom_op("kdlayers::recognise_backward", mutates_args=())
def recognise_backward(
    grad_value: Tensor,
    grad_scores: Tensor | None,
    units: Tensor,
    templates: Tensor,
    gamma: Tensor,
    beta: Tensor,
    values: Tensor,
    scores: Tensor | None,
    value: Tensor,
    mean: Tensor,
    variance: Tensor,
    norms: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `recognise` for units, templates, gamma, beta and values."""
    with torch.autocast(units.device.type, enabled=False):
        n, low, work = len(units), units.dtype, mean.dtype
        recognised = _Recognised(units, templates, gamma, beta, mean, variance + eps, scores)
        grad_units = torch.empty_like(units, dtype=work)
        grad_templates = torch.zeros_like(templates, dtype=work)
        grad_values = values.new_zeros(values.shape[::-1], dtype=work)
        grad_gamma, grad_beta, received = (torch.zeros_like(mean) for _ in range(3))
        inverted = inverse(norms).unsqueeze(1)
        upstream = grad_value.to(work) * inverted
        # p is divided by its own norm: moving along p changes nothing.
        along = (upstream * value.to(work)).sum(dim=1, keepdim=True) * inverted
        upstream = upstream.to(low)
        for part in chunks(n, len(templates), units.device):
            assigned = recognised[part]
            add_product(grad_values, assigned.to(low).T, upstream[part])
            grad = (upstream[part] @ values).to(work).addcmul_(assigned, along[part], value=-1)
            torch.ops.aten.threshold_backward.grad_input(grad, assigned, 0, grad_input=grad)
            grad_beta += grad.sum(dim=0)
            if scores is None:
                narrow, matrix = grad.to(low), recognised.folded
            else:
                grad_gamma += (scores[part] - mean).mul_(grad).sum(dim=0)
                grad.mul_(recognised.factor)
                if grad_scores is not None:
                    grad += grad_scores[part]
                    received += grad_scores[part].sum(dim=0, dtype=work)
                narrow, matrix = grad.to(low), templates
            grad_units[part] = narrow @ matrix
            add_product(grad_templates, narrow.T, recognised.centred[part])
        if scores is None:
            grad_gamma = (grad_templates * templates).sum(dim=1)
            grad_templates.mul_(recognised.factor.unsqueeze(1))
        else:
            grad_templates.addr_(received, recognised.mean_unit)
        grad_gamma *= recognised.rstd
        _through_moments(recognised, grad_gamma, grad_beta, grad_units, grad_templates)
    grads = (grad_units.to(low), grad_templates.to(low), grad_gamma, grad_beta)
    return *grads, grad_values.T.contiguous().to(low)


@recognise_backward.register_fake
def _(
    grad_value: Tensor,  # noqa: ARG001
    grad_scores: Tensor | None,  # noqa: ARG001
    units: Tensor,
    templates: Tensor,
    gamma: Tensor,
    beta: Tensor,
    values: Tensor,
    *_: object,
) -> Five:
    like = torch.empty_like
    return like(units), like(templates), like(gamma), like(beta), like(values)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Five) -> None:
    *tensors, ctx.eps, ctx.keep = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad_value: Tensor, grad_scores: Tensor, *_: object) -> tuple[Any, ...]:
    units, templates, gamma, beta, values, value, scores, *statistics = ctx.saved_tensors
    if not ctx.keep:
        grad_scores = scores = None  # type: ignore[assignment]  # empty stand-ins
    inputs = (units, templates, gamma, beta, values)
    grads = recognise_backward(
        grad_value, grad_scores, *inputs, scores, value, *statistics, ctx.eps
    )
    return (*grads, None, None)


recognise.register_autograd(_backward, setup_context=_setup)


def recognise_frozen(units: Tensor, matching: Tensor, threshold: Tensor, values: Tensor) -> Tensor:
    """As `recognise`, at inference: v ``[N, C]``, with the batch norm's constants folded in.

    Args:
        units: u, unit vectors of the positions, ``[N, C]``.
        matching: templates times the gain of the batch norm, ``[K, C]``, of the dtype of ``units``.
        threshold: its bias less gain times mean, ``[K]``.
        values: V, unit rows times the scale, ``[C, K]``, of the dtype of ``units``.
    """
    with torch.autocast(units.device.type, enabled=False):
        bias, value = threshold.to(units.dtype), units.new_empty(len(units), len(values))
        for part in chunks(len(units), len(matching), units.device):
            assigned = torch.addmm(bias, units[part], matching.T).relu_()
            rows = torch.mm(assigned, values.T, out=value[part])
            rows.mul_(inverse_norm(assigned))  # 0 * 1e12 if nothing was recognised
    return value


class _Recognised:
    """The assignment p, one chunk at a time, from stored scores or recomputed from the units."""

    def __init__(
        self,
        units: Tensor,
        templates: Tensor,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        spread: Tensor,
        scores: Tensor | None,
    ) -> None:
        self.templates = templates
        self.beta = beta
        self.mean = mean
        self.scores = scores
        self.rstd = spread.rsqrt()
        self.factor = gamma * self.rstd
        self.mean_unit = units.to(mean.dtype).mean(dim=0)
        self.centred = (units - self.mean_unit).to(units.dtype)
        if scores is None:
            # Fold the batch norm's factor into the product; beta is the bias.
            self.folded = (templates * self.factor.unsqueeze(1)).to(units.dtype)

    def __getitem__(self, part: slice) -> Tensor:
        """Rows ``part`` of p: a new tensor, in the precision of sums."""
        if self.scores is not None:
            return torch.addcmul(self.beta, self.scores[part] - self.mean, self.factor).relu_()
        rows = self.centred[part]
        return (
            torch.addmm(self.beta.to(rows.dtype), rows, self.folded.T).relu_().to(self.mean.dtype)
        )


def _moments(units: Tensor, templates: Tensor, scores: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the scores over positions, each ``[K]``."""
    work = work_dtype(units)
    if scores is None:  # in float64: few numbers, on which all scores depend
        units, templates = units.double(), templates.double()
        centred = units - units.mean(dim=0)
        covariance = centred.T @ centred / len(units)
        variance = ((templates @ covariance) * templates).sum(dim=1).clamp_min(0)
        return (templates @ units.mean(dim=0)).to(work), variance.to(work)
    mean = templates.to(work) @ units.to(work).mean(dim=0)
    squares = torch.zeros_like(mean)
    for part in chunks(len(scores), len(templates), scores.device):
        squares += (scores[part] - mean).square_().sum(dim=0)
    return mean, squares / len(units)


def _through_moments(
    recognised: _Recognised,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    grad_units: Tensor,
    grad_templates: Tensor,
) -> None:
    """Subtract the gradient through the batch's mean and variance, for all positions.

    It is ``shift + slope * (a - mean)`` at each position. The shift does not reach the templates,
    because the sum of the centred units is zero.
    """
    n, templates = len(grad_units), recognised.templates.to(grad_units.dtype)
    centred = recognised.centred.to(grad_units.dtype)
    shift = recognised.factor * grad_beta / n
    slope = (recognised.factor * recognised.rstd * grad_gamma / n).unsqueeze(1)
    grad_units -= shift @ templates
    grad_units.addmm_(centred, templates.T @ (slope * templates), alpha=-1)
    grad_templates -= slope * (templates @ (centred.T @ centred))
