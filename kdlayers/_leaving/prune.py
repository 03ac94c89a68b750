"""Pruning: removes templates that rarely or never fire."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.examples import to_model
from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import is_ddp, refuse_shards, student_inside
from kdlayers._step.batches import check_loader, split_batch
from kdlayers._step.sites import inserts, slots
from kdlayers._step.slot import Slot
from kdlayers._utils.distributed import all_sum
from kdlayers.errors import ArgumentError, AttachError, FitError
from kdlayers.functional import _checks as check


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
    above zero. A template that never fires adds nothing to the features but contributes to the
    norms of the value kernels. One silent template is therefore kept and takes over these
    contributions, so that outputs on the data are unchanged up to rounding. The student is changed
    in place: prune after training, and make a new optimiser if you continue training.

    All positions of the layer count, including class and register tokens, because they affect the
    output too. (:func:`kdlayers.viz.template_usage` is about regions of images and ignores these
    tokens.)

    Args:
        student: a detached model with KD layers. Under DDP all processes call this together, each
            with its part of the data, and wrap the student again to continue training.
        loader: batches of images, or of (images, labels), as the student will see them.
        budget: largest share of positions, from 0 up to 1, at which a removed template may fire.
            With 0 (the default) outputs on this data stay the same; above 0 they change slightly.

    Returns:
        For every KD layer an object with the ``name`` of its point, the number of templates
        ``before`` and ``after``, and the ``parameters`` and ``macs`` (multiply-adds per position)
        that were saved.

    Raises:
        ArgumentError: if ``budget`` is not in [0, 1), or a batch holds no images.
        ArgumentTypeError: if ``budget`` is not a number, or ``loader`` cannot give batches.
        AttachError: if there are no KD layers, a handle is still attached, or FSDP has split the
            student.
        FitError: if the loader is empty, or scores are NaN or infinite; nothing is pruned then.

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
    check_loader(loader, "prune_templates")
    budget = check.not_negative("budget", budget)
    if budget >= 1:
        raise ArgumentError(f"budget is a share of positions in [0, 1), got {budget}")
    together = is_ddp(student)
    student = student_inside(student)
    refuse_shards(student, "prune_templates")
    if any(hook.tape.armed for _, _, hook in inserts(student)):
        raise AttachError("the student is still attached; call kd.detach() before pruning")
    layers = slots(student)
    if not layers:
        raise AttachError(
            f"this {type(student).__name__} has no KD layers to prune; pass a student with KD "
            "layers, from attach_kd(student, teacher, at=[...]) or load_student"
        )
    for name, slot in layers.items():
        _check_plain(name, slot)
    shares = _firing_shares(student, layers, loader, together)
    return [_prune(name, slot, shares[name] > budget) for name, slot in layers.items()]


def _firing_shares(
    student: nn.Module, layers: dict[str, Slot], loader: Iterable[Any], together: bool
) -> dict[str, Tensor]:
    """For each layer, the share of positions at which each template fires.

    With ``together`` the data of all processes count.
    """
    # Firing counts for each template, then the numbers of positions and of nonfinite scores.
    counts = {
        name: torch.zeros(slot.head.num_templates + 2, dtype=torch.long, device="cpu")
        for name, slot in layers.items()
    }

    def counting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(_module: nn.Module, _args: Any, scores: Tensor) -> None:
            broken = (~scores.isfinite()).sum()
            seen = torch.stack([torch.full_like(broken, len(scores)), broken])
            found = torch.cat([(scores > 0).sum(0), seen])
            counts[name] = counts[name].to(found.device) + found

        return count

    hooks = [slot.norm.register_forward_hook(counting(name)) for name, slot in layers.items()]
    try:
        with undisturbed(student):
            for batch in loader:
                student(*to_model((split_batch(batch, "prune_templates")[0],), student))
    finally:
        for hook in hooks:
            hook.remove()
    if together:
        counts = {name: all_sum(count) for name, count in counts.items()}
    if any(count[-2] == 0 for count in counts.values()):
        raise FitError("prune_templates() was given an empty loader: it gave no batch")
    broken = [name for name, count in counts.items() if count[-1] > 0]
    if broken:
        raise FitError(
            f"scores of the KD layer at {broken[0]!r} are NaN or infinite on this data, so it is "
            "unknown which templates fire, and nothing was pruned; look for NaN in the images and "
            "in the student's weights"
        )
    return {name: count[:-2] / count[-2] for name, count in counts.items()}


def _check_plain(name: str, slot: Slot) -> None:
    """Raise AttachError if a layer's weights are computed from others and cannot be sliced."""
    for module in (slot.head, slot.value):
        if not isinstance(dict(module.named_parameters(recurse=False)).get("weight"), nn.Parameter):
            raise AttachError(
                f"the KD layer at {name!r} has a parametrised or pruned weight; make it permanent "
                "first (torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune"
                ".remove)"
            )


def _prune(name: str, slot: Slot, fires: Tensor) -> PrunedLayer:
    head, norm, value = slot.head, slot.norm, slot.value
    before, channels = head.num_templates, head.in_channels
    silent = (~fires).nonzero().flatten()
    if len(silent) > 1:
        # The one that stays holds the removed part of each value kernel's norm, and never fires.
        rest, stays = value.weight[:, silent].norm(dim=1), silent[:1]
        kept = torch.cat([fires.nonzero().flatten(), stays])
        head.weight = _like(head.weight, head.weight[kept])
        columns = torch.cat([value.weight[:, kept[:-1]], rest[:, None]], 1)
        value.weight = _like(value.weight, columns)
        _keep(norm, kept)
        norm.weight[-1], norm.bias[-1] = 0.0, -1.0
    after = head.num_templates
    gone = before - after
    return PrunedLayer(name, before, after, gone * (2 * channels + 2), 2 * gone * channels)


def _keep(norm: nn.BatchNorm1d, kept: Tensor) -> None:
    norm.weight, norm.bias = (
        _like(norm.weight, norm.weight[kept]),
        _like(norm.bias, norm.bias[kept]),
    )
    norm.running_mean = norm.running_mean[kept] if norm.running_mean is not None else None
    norm.running_var = norm.running_var[kept] if norm.running_var is not None else None
    norm.num_features = len(kept)


def _like(old: nn.Parameter, values: Tensor) -> nn.Parameter:
    """A parameter that trains if ``old`` did."""
    return nn.Parameter(values, requires_grad=old.requires_grad)
