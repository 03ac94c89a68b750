"""One KD layer on a few images: what it matched where, and what it did to the features."""

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers._models.wrappers import refuse_shards, student_inside
from kdlayers._targets.kmeans import principal_axes
from kdlayers.errors import AttachError
from kdlayers.functional import _checks as check
from kdlayers.viz._watch import assign, check_images, find_layer, layout_of, watched

By: TypeAlias = Literal["assignment", "scores"]


@dataclass(frozen=True)
class LayerView:
    """What one KD layer did on a batch of B images, at each of H x W positions.

    Class and register tokens are left out. A vector is a grid of one position.
    """

    name: str
    """The layer's point."""
    before: Tensor
    """Features before the layer, x: ``[B, H, W, C]``."""
    after: Tensor
    """Features after it, x + alpha v: ``[B, H, W, C]``."""
    scores: Tensor
    """Scores of the templates, a: ``[B, H, W, K]``."""
    assignment: Tensor
    """Soft assignment, p = ReLU(BN(a)): ``[B, H, W, K]``; 0 where a template does not fire."""


def layer_view(student: nn.Module, images: Tensor, at: str | None = None) -> LayerView:
    r"""Run ``student`` on ``images`` and return what one of its KD layers did.

    .. math:: a = \operatorname{cos}(x; W, s_t), \qquad p = \operatorname{ReLU}(\operatorname{BN}
        (a)), \qquad \hat x = x + \alpha v

    as in :class:`~kdlayers.KDLayer`. The student runs in eval mode without gradient; its training
    flags, the random states and a recorded training step do not change. All scores are kept, so
    pass a few images only, and use :func:`template_usage` for whole data sets.

    Args:
        student: a model with KD layers, attached, detached, loaded or baked. It may be wrapped, as
            by ``torch.compile``, DDP or ``AveragedModel``.
        images: as the student takes them, ``[B, channels, height, width]``.
        at: name of the layer's point; optional if there is only one.

    Returns:
        The features before and after, the scores and the assignments, as grids.

    Raises:
        AttachError: if the student has no KD layers, if FSDP has split it, or if the layer did not
            run exactly once.
        ArgumentError: if there are several layers and ``at`` is not given.
        NoMatchError: if there is no KD layer of this name.
        ArgumentTypeError: if ``images`` is not a tensor.
        ShapeError: if ``images`` is not a batch.
        LayoutError: if the layer's tokens do not form a grid of the images' proportions.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDPoint, attach_kd, viz
        >>> student = resnet18()
        >>> kd = attach_kd(student, at=[KDPoint("layer4", num_templates=16)])
        >>> view = viz.layer_view(student, torch.randn(2, 3, 96, 64))
        >>> view.before.shape, view.scores.shape
        (torch.Size([2, 3, 2, 512]), torch.Size([2, 3, 2, 16]))
    """
    student = student_inside(student)
    refuse_shards(student, "layer_view")
    check_images(images)
    name, layer = find_layer(student, at)
    seen = watched(student, layer, images)
    if len(seen) != 1:
        raise AttachError(
            f"the KD layer at {name!r} ran {len(seen)} times in one forward; only layers that run "
            "once can be shown"
        )
    layout = layout_of(seen[0][0], name, layer, student, images)
    before, after = map(layout.to_grid, seen[0])
    with torch.no_grad():
        scores, assignment = assign(layer, before)
    return LayerView(name, before, after, scores, assignment)


def match_map(view: LayerView, *, by: By = "assignment") -> Tensor:
    r"""Which template each position matched best.

    .. math:: m_i = \operatorname*{argmax}_k p_{ik}

    Args:
        view: from :func:`layer_view`.
        by: ``"assignment"`` (default): by p, which acts on the features; -1 means that no template
            fires and the features do not change. ``"scores"``: by a, which the teacher supervises;
            it is never -1. The two differ by the batch norm.

    Returns:
        ``[B, H, W]``, int64, -1 to K - 1.

    Raises:
        ArgumentError: if ``by`` is neither.

    Example:
        >>> import torch
        >>> from kdlayers.viz import LayerView, match_map
        >>> p = torch.tensor([[[[0.0, 2.0, 1.0], [0.0, 0.0, 0.0]]]])  # one image, 1 x 2 positions
        >>> x = torch.randn(1, 1, 2, 4)
        >>> match_map(LayerView("layer4", x, x, p, p))
        tensor([[[ 1, -1]]])
    """
    check.one_of("by", by, get_args(By))
    if by == "scores":
        return view.scores.argmax(-1)
    return best_templates(view.assignment)


def best_templates(assignment: Tensor) -> Tensor:
    """Index of the largest entry of ``[..., K]``; -1 if none is above zero."""
    strength, best = assignment.max(-1)
    return torch.where(strength > 0, best, -1)


def norm_maps(view: LayerView) -> tuple[Tensor, Tensor]:
    r"""The norms of the features, and of what the layer adds to them.

    .. math:: \lVert x_i \rVert_2, \qquad \lVert \hat x_i - x_i \rVert_2

    Args:
        view: the layer's inputs and outputs for a batch.

    Returns:
        Two tensors ``[B, H, W]``, 0 or more.

    Example:
        >>> import torch
        >>> from kdlayers.viz import LayerView, norm_maps
        >>> x, p = torch.tensor([[[[3.0, 4.0]]]]), torch.ones(1, 1, 1, 5)
        >>> norm_maps(LayerView("layer4", x, x + 1, p, p))
        (tensor([[[5.]]]), tensor([[[1.4142]]]))
    """
    added = view.after - view.before
    return view.before.norm(dim=-1), added.norm(dim=-1)


def feature_colors(view: LayerView) -> tuple[Tensor, Tensor]:
    """Features before and after the layer as colours: equal colours mean similar features.

    Red, green and blue are the first three principal components of all positions before and after
    the layer, so that the two can be compared. Each side is centred separately first, so a constant
    offset that the layer adds is not shown. Each component is scaled so that all but 2 % of the
    positions at either end lie in 0 to 1; one that does not vary is 0.5.

    Args:
        view: the layer's inputs and outputs for a batch.

    Returns:
        Before and after, ``[B, 3, H, W]`` in 0 to 1, on the CPU.

    Example:
        >>> import torch
        >>> from kdlayers.viz import LayerView, feature_colors
        >>> x, p = torch.randn(2, 4, 4, 8), torch.ones(2, 4, 4, 5)
        >>> before, after = feature_colors(LayerView("layer4", x, x + 1, p, p))
        >>> before.shape, torch.allclose(before, after)
        (torch.Size([2, 3, 4, 4]), True)
    """
    batch, height, width, channels = view.before.shape
    # On the CPU: not every accelerator has float64 and eigenvectors.
    sides = [side.reshape(-1, channels).cpu().double() for side in (view.before, view.after)]
    rows = torch.cat([side - side.mean(0) for side in sides])
    axes = principal_axes(rows)[0][:, :3]
    # The sign of an axis is arbitrary: let its largest entry be positive.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    parts = rows @ axes
    spread = parts.square().sum(0)
    parts = F.pad(parts * (spread > 1e-12 * spread.max()), (0, 3 - parts.shape[1]))
    low, high = parts.quantile(parts.new_tensor([0.02, 0.98]), dim=0)
    reach = high - low
    scaled = ((parts - low) / torch.where(reach > 0, reach, 1.0)).clamp(0, 1)
    colors = torch.where(reach > 0, scaled, 0.5).to(torch.float32)
    before, after = colors.view(2, batch, height, width, 3).movedim(-1, 2)
    return before, after
