"""Match maps as colours over their images."""

from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.functional import _checks as check

RGB: TypeAlias = tuple[int, int, int]

# Most colour-blind readers can distinguish these: M. Okabe, K. Ito, "Color Universal Design", 2008.
PALETTE = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)
OTHERS = (128, 128, 128)


def template_colors(matches: Tensor, num_templates: int, *, top: int = len(PALETTE)) -> Tensor:
    """A colour for every template; the most frequent ones of ``matches`` get their own.

    Args:
        matches: best templates from :func:`match_map`, of any shape; -1 is not counted.
        num_templates: number of templates K.
        top: number of templates with their own colour, 1 to 7 (default); the others are grey.

    Returns:
        ``[K, 3]``, uint8: the colours of Okabe and Ito (2008), which colour-blind readers can
        distinguish, in their order.

    Raises:
        ArgumentError: if ``top`` is not in 1 to 7, or a template is not in 0 to K - 1.

    Example:
        >>> import torch
        >>> from kdlayers.viz import template_colors
        >>> template_colors(torch.tensor([2, 2, 2, 0, -1]), 4, top=1)
        tensor([[128, 128, 128],
                [128, 128, 128],
                [230, 159,   0],
                [128, 128, 128]], dtype=torch.uint8)
    """
    check.count("num_templates", num_templates)
    if not 1 <= top <= len(PALETTE):
        raise ArgumentError(f"top must be in 1..{len(PALETTE)}, the number of colours, got {top}")
    colors = torch.tensor([OTHERS], dtype=torch.uint8, device="cpu").repeat(num_templates, 1)
    for color, template in zip(PALETTE, frequent(matches, num_templates)[:top], strict=False):
        colors[template] = torch.tensor(color, dtype=torch.uint8, device="cpu")
    return colors


def frequent(matches: Tensor, num_templates: int) -> list[int]:
    """The templates in ``matches``, most frequent first; on ties the lower index first."""
    found = matches[matches >= 0].flatten().cpu()
    if len(found) and int(found.max()) >= num_templates:
        raise ArgumentError(
            f"matches has template {int(found.max())}, but num_templates is {num_templates}"
        )
    counts = torch.bincount(found, minlength=num_templates)
    order = counts.argsort(descending=True, stable=True)
    return [int(k) for k in order if counts[k] > 0]


def overlay(
    image: Tensor, matches: Tensor, colors: Tensor | None = None, *, alpha: float = 0.5
) -> Tensor:
    """One image with every region in the colour of the template that it matched.

    The map is enlarged to the image by nearest neighbour. Regions without a match (-1) keep the
    image's colours.

    Args:
        image: ``[3, height, width]``, or ``[1, height, width]`` for grey; uint8, or floating-point
            in 0 to 1. Undo a normalisation first, ``image * std + mean``.
        matches: one map from :func:`match_map`, ``[H, W]``.
        colors: a colour for every template, uint8 ``[K, 3]``; default: :func:`template_colors` of
            this map. To compare images pass the colours of all maps.
        alpha: opacity of the colours, 0 to 1. Default 0.5.

    Returns:
        ``[3, height, width]``, uint8, on the CPU.

    Raises:
        ArgumentTypeError: if ``image`` is not a tensor or ``matches`` not an integer tensor.
        ShapeError: if a shape is wrong.
        ArgumentError: if ``alpha`` or a value of the image is not in 0 to 1, or ``colors`` has no
            row for a template.

    Example:
        >>> import torch
        >>> from kdlayers.viz import overlay
        >>> picture = overlay(torch.zeros(1, 4, 4), torch.tensor([[0, -1]]), alpha=1.0)
        >>> picture[:, 0, 0], picture[:, 0, 3]
        (tensor([230, 159,   0], dtype=torch.uint8), tensor([0, 0, 0], dtype=torch.uint8))
    """
    from torchvision.utils import draw_segmentation_masks

    if not 0 <= alpha <= 1:
        raise ArgumentError(f"alpha is an opacity in 0..1, got {alpha}")
    picture = as_picture(image)
    if not isinstance(matches, Tensor) or matches.is_floating_point():
        kind = matches.dtype if isinstance(matches, Tensor) else type(matches).__name__
        raise ArgumentTypeError(f"matches must be an integer tensor from match_map, got {kind}")
    if matches.dim() != 2:
        raise ShapeError(
            f"matches must be one map [H, W], got {tuple(matches.shape)}; take one of a batch, "
            "match_map(view)[0]"
        )
    matches = matches.cpu()
    present = [int(k) for k in matches.unique() if k >= 0]
    if colors is None:
        colors = template_colors(matches, max(present, default=0) + 1)
    _check_colors(colors, present)
    if not present:
        return picture
    size = (picture.shape[1], picture.shape[2])
    regions = torch.stack([matches == k for k in present])
    masks = F.interpolate(regions[None].float(), size, mode="nearest-exact")[0].bool()
    chosen: list[str | RGB] = [rgb(colors[k]) for k in present]
    drawn: Tensor = draw_segmentation_masks(picture, masks, alpha=alpha, colors=chosen)
    return drawn


def rgb(color: Tensor) -> RGB:
    """One row of the colors as a tuple, for drawing libraries."""
    red, green, blue = color.tolist()
    return red, green, blue


def as_picture(image: Tensor) -> Tensor:
    """``image`` as ``[3, height, width]``, uint8, on the CPU."""
    check.tensor("image", image)
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ShapeError(
            f"image must be [3, height, width] or [1, height, width], got {tuple(image.shape)}; "
            "take one image of a batch, images[0]"
        )
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        image = _to_bytes(image)
    return image.expand(3, -1, -1).contiguous()


def _to_bytes(image: Tensor) -> Tensor:
    if not image.is_floating_point():
        raise ArgumentTypeError(f"image must be uint8 or floating-point, got {image.dtype}")
    low, high = float(image.min()), float(image.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
        raise ArgumentError(
            f"a floating-point image must lie in 0..1, got values from {low:.4g} to {high:.4g}; "
            "undo its normalisation first: image * std + mean"
        )
    return (image.float().clamp(0, 1) * 255).round().to(torch.uint8)


def _check_colors(colors: Tensor, present: list[int]) -> None:
    if colors.dim() != 2 or colors.shape[1] != 3 or colors.dtype != torch.uint8:
        raise ShapeError(
            f"colors must be uint8 [K, 3], got {colors.dtype} {tuple(colors.shape)}; "
            "use template_colors(matches, K)"
        )
    if max(present, default=0) >= len(colors):
        raise ArgumentError(
            f"matches has template {max(present)}, but there are {len(colors)} colors; use "
            "template_colors(matches, view.scores.shape[-1])"
        )
