"""Pruning: templates that never, or hardly ever, match anything go."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.trace import to_model
from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import unwrap
from kdlayers._step.batches import split_batch
from kdlayers._step.hooks import Slot
from kdlayers._step.sites import inserts, slots
from kdlayers.errors import ArgumentError, AttachError, FitError


@dataclass(frozen=True)
class PrunedLayer:
    """What pruning did at one point."""

    name: str
    before: int
    """Templates before."""
    after: int
    """Templates after."""
    parameters: int
    """Parameters saved."""
    macs: int
    """Multiply-adds saved at each position."""


@torch.no_grad()
def prune_templates(
    student: nn.Module, loader: Iterable[Any], *, budget: float = 0.0
) -> list[PrunedLayer]:
    r"""Remove templates that fire at no position of the data, or at few of them.

    A template fires where its entry of :math:`p = \operatorname{ReLU}(\operatorname{BN}(a))` is
    above zero. One that fires nowhere adds nothing, but it has a share in the norms of the value
    kernels; one silent template stays and takes over the shares of all that go, so that outputs on
    the data are unchanged up to rounding. The student is changed in place: prune after training,
    and make a new optimiser if you train on.

    Every position counts that goes through the layer, with class and register tokens, whose
    templates act on the output as others do. (:func:`kdlayers.viz.template_usage`, which is about
    regions of images, leaves these tokens out.)

    Args:
        student: a detached model with KD layers.
        loader: batches of images, or of (images, labels), as the student will see them.
        budget: greatest share of positions, 0 to 1, at which a template that goes may fire. 0 (the
            default): outputs on this data stay the same. Above 0 they change a little.

    Returns:
        For every KD layer what was there, what is left and what was saved.

    Raises:
        ArgumentError: if ``budget`` is not in [0, 1).
        AttachError: if there are no KD layers, or a handle is still attached.
        FitError: if the loader is empty.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDPoint, attach_kd, prune_templates
        >>> student = resnet18().eval()
        >>> kd = attach_kd(student, at=[KDPoint("layer4", num_templates=64)])
        >>> kd.detach()
        >>> images = torch.randn(2, 3, 64, 64)
        >>> before = student(images)
        >>> (layer,) = prune_templates(student, [images])
        >>> layer.after < layer.before, torch.allclose(student(images), before, atol=1e-5)
        (True, True)
    """
    student, _ = unwrap(student, "student")
    if not 0 <= budget < 1:
        raise ArgumentError(f"budget is a share of positions in [0, 1), got {budget}")
    if any(hook.tape.armed for _, _, hook in inserts(student)):
        raise AttachError("the student is still attached; call kd.detach() before pruning")
    layers = slots(student)
    if not layers:
        raise AttachError(f"this {type(student).__name__} has no KD layers to prune")
    shares = _firing_shares(student, layers, loader)
    return [_prune(name, slot, shares[name] > budget) for name, slot in layers.items()]


def _firing_shares(
    student: nn.Module, layers: dict[str, Slot], loader: Iterable[Any]
) -> dict[str, Tensor]:
    """For each layer, the share of positions at which each template fires."""
    fired: dict[str, Tensor | float] = dict.fromkeys(layers, 0.0)
    positions = dict.fromkeys(layers, 0)

    def counting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(_module: nn.Module, _args: Any, scores: Tensor) -> None:
            fired[name] = fired[name] + (scores > 0).sum(0)
            positions[name] += len(scores)

        return count

    hooks = [slot.norm.register_forward_hook(counting(name)) for name, slot in layers.items()]
    try:
        with undisturbed(student):
            for batch in loader:
                student(*to_model((split_batch(batch)[0],), student))
    finally:
        for hook in hooks:
            hook.remove()
    if not all(positions.values()):
        raise FitError("prune_templates() was given an empty loader: it gave no batch")
    return {name: torch.as_tensor(fired[name]) / positions[name] for name in layers}


def _prune(name: str, slot: Slot, fires: Tensor) -> PrunedLayer:
    head, norm, value = slot.head, slot.norm, slot.value
    before, channels = head.num_templates, head.in_channels
    silent = (~fires).nonzero().flatten()
    if len(silent) > 1:
        # The one that stays holds the removed part of each value kernel's norm, and never fires.
        rest, stays = value.weight[:, silent].norm(dim=1), silent[:1]
        kept = torch.cat([fires.nonzero().flatten(), stays])
        head.weight = nn.Parameter(head.weight[kept])
        value.weight = nn.Parameter(torch.cat([value.weight[:, kept[:-1]], rest[:, None]], 1))
        _keep(norm, kept)
        norm.weight[-1], norm.bias[-1] = 0.0, -1.0
    after = head.num_templates
    gone = before - after
    return PrunedLayer(name, before, after, gone * (2 * channels + 2), 2 * gone * channels)


def _keep(norm: nn.BatchNorm1d, kept: Tensor) -> None:
    norm.weight, norm.bias = nn.Parameter(norm.weight[kept]), nn.Parameter(norm.bias[kept])
    norm.running_mean = norm.running_mean[kept] if norm.running_mean is not None else None
    norm.running_var = norm.running_var[kept] if norm.running_var is not None else None
    norm.num_features = len(kept)
