"""How often each template fires, and how often it is the best match."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._layer.layer import LayerParts
from kdlayers._models.layouts import Layout
from kdlayers._models.wrappers import refuse_shards, student_inside
from kdlayers._step.batches import check_loader, split_batch
from kdlayers._utils.chunks import chunks
from kdlayers.errors import FitError
from kdlayers.viz._view import best_templates
from kdlayers.viz._watch import assign, check_images, find_layer, layout_of, watched


@dataclass(frozen=True)
class TemplateUsage:
    """How often each of the K templates of a KD layer was used on some data."""

    name: str
    """The layer's point."""
    fires: Tensor
    """Positions at which each template fires, p > 0: ``[K]``, int64."""
    best: Tensor
    """Positions at which each template has the largest p: ``[K]``, int64."""
    positions: int
    """Number of all positions; at ``positions - best.sum()`` of them no template fires."""

    @property
    def silent(self) -> Tensor:
        """Indices of the templates that fire nowhere."""
        return (self.fires == 0).nonzero().flatten()


def template_usage(
    student: nn.Module, loader: Iterable[Any], at: str | None = None
) -> TemplateUsage:
    r"""Count at how many positions each template of a KD layer fires, and is the best match.

    .. math:: \#\{i : p_{ik} > 0\}, \qquad \#\{i : k = \operatorname*{argmax}_{k'} p_{ik'},\;
        p_{ik} > 0\}

    The student runs in eval mode without gradient. As in :func:`match_map`, only regions of the
    images are counted, and not class and register tokens. A template that is silent here may still
    act on those tokens, so :func:`~kdlayers.prune_templates` counts all positions.

    Args:
        student: a model with KD layers, attached, detached, loaded or baked. It may be wrapped, as
            by ``torch.compile``, DDP or ``AveragedModel``.
        loader: batches of images, or of (images, labels), as the student takes them.
        at: name of the layer's point; optional if there is only one.

    Returns:
        The counts, on the student's device.

    Raises:
        FitError: if the loader is empty.
        AttachError, ArgumentError, ArgumentTypeError, NoMatchError, ShapeError, LayoutError: as in
            :func:`layer_view`.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDPoint, attach_kd, viz
        >>> student = resnet18()
        >>> kd = attach_kd(student, at=[KDPoint("layer4", num_templates=16)])
        >>> usage = viz.template_usage(student, [torch.randn(2, 3, 64, 64)])
        >>> usage.positions, bool((usage.best <= usage.fires).all())
        (8, True)
    """
    check_loader(loader, "template_usage")
    student = student_inside(student)
    refuse_shards(student, "template_usage")
    name, layer = find_layer(student, at)
    fires = torch.zeros(layer.head.num_templates, dtype=torch.int64, device="cpu")
    best, positions = fires.clone(), 0
    layouts: dict[tuple[torch.Size, torch.Size], Layout] = {}
    for batch in loader:
        images = check_images(split_batch(batch, "template_usage")[0])
        for before, _ in watched(student, layer, images):
            shapes = (before.shape, images.shape)
            if shapes not in layouts:
                layouts[shapes] = layout_of(before, name, layer, student, images)
            rows = layouts[shapes].to_grid(before).flatten(0, -2)
            fired, won = _count(layer, rows)
            fires, best = fires.to(rows.device) + fired, best.to(rows.device) + won
            positions += len(rows)
    if not positions:
        raise FitError("template_usage() was given an empty loader: it gave no batch")
    return TemplateUsage(name, fires, best, positions)


@torch.no_grad()
def _count(layer: LayerParts, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Counts ``[K]`` of features ``[N, C]``, without a tensor ``[N, K]``."""
    templates = layer.head.num_templates
    fires = torch.zeros(templates, dtype=torch.int64, device=rows.device)
    best = fires.clone()
    for part in chunks(len(rows), templates, rows.device):
        assignment = assign(layer, rows[part])[1]
        fires += (assignment > 0).sum(0)
        # The first count is for the positions where none fires.
        best += torch.bincount(best_templates(assignment) + 1, minlength=templates + 1)[1:]
    return fires, best
