"""Figures of what a KD layer does on images and on data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdlayers.errors import ShapeError
from kdlayers.viz._canvas import drawable, new_figure
from kdlayers.viz._overlay import (
    OTHERS,
    PALETTE,
    RGB,
    as_picture,
    frequent,
    overlay,
    rgb,
    template_colors,
)
from kdlayers.viz._usage import TemplateUsage
from kdlayers.viz._view import By, LayerView, feature_colors, match_map, norm_maps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = (
    "image",
    "best template",
    "length before,\n$\\Vert x\\Vert$",
    "length added,\n$\\Vert\\hat{x}-x\\Vert$",
    "features\nbefore",
    "features\nafter",
)
CELL = 1.35
"""Side of an image in inches."""
WRITTEN = 5
"""Maps of up to this many positions a side show the numbers of the templates."""


def plot_matches(
    view: LayerView, images: Tensor, *, by: By = "assignment", top: int = len(PALETTE)
) -> Figure:
    """What a KD layer matched and changed, one row for each image.

    From left to right: the image; the template that each region matched (:func:`overlay`); the
    lengths of the features and of what the layer adds (:func:`norm_maps`); the features before and
    after as colours (:func:`feature_colors`). Maps of up to 5 x 5 regions show the numbers of the
    templates.

    Args:
        view: from :func:`layer_view`.
        images: the same images to show, ``[B, 1 or 3, height, width]``: uint8, or floating-point in
            0 to 1. Undo a normalisation first, ``images * std + mean``.
        by: as in :func:`match_map`.
        top: number of templates with their own colour, 1 to 7 (default).

    Returns:
        The figure.

    Raises:
        MissingPackageError: without matplotlib, which the extra ``viz`` installs.
        ShapeError: if the images are not those of the view.
        ArgumentError: if values of the images are not in 0 to 1, or ``top`` is not in 1 to 7.

    Example:
        >>> import torch
        >>> from kdlayers.viz import LayerView, plot_matches
        >>> x, p = torch.randn(2, 4, 4, 8), torch.rand(2, 4, 4, 5)
        >>> figure = plot_matches(LayerView("layer4", x, x + 1, p, p), torch.rand(2, 3, 32, 32))
        >>> len(figure.axes)  # two rows of six, and two bars of lengths
        14
    """
    if images.dim() != 4 or len(images) != len(view.before):
        raise ShapeError(
            f"images must be the {len(view.before)} images of the view, [B, channels, height, "
            f"width], got {tuple(images.shape)}"
        )
    rows = len(images)
    matches, templates = match_map(view, by=by).cpu(), view.scores.shape[-1]
    colors = template_colors(matches, templates, top=top)
    figure = new_figure("plot_matches", CELL * len(COLUMNS) + 1.0, CELL * rows + 1.3)
    axes = figure.subplots(rows, len(COLUMNS), squeeze=False)
    for row, image, found in zip(axes, images, matches, strict=True):
        row[0].imshow(_pixels(as_picture(image)))
        _draw_matches(row[1], image, found, colors)
    _draw_lengths(figure, axes[:, 2:4], norm_maps(view))
    for column, side in zip(axes[:, 4:].T, feature_colors(view), strict=True):
        for cell, picture in zip(column, side, strict=True):
            cell.imshow(_pixels(picture))
    for title, cell in zip(COLUMNS, axes[0], strict=True):
        cell.set_title(title, fontsize=9)
    for cell in axes.flat:
        cell.set_xticks([])
        cell.set_yticks([])
    figure.suptitle(f"KD layer at {view.name}, {templates} templates", fontsize=10)
    _legend(figure, matches, colors, top)
    return figure


def _pixels(picture: Tensor) -> Any:
    return drawable(picture.movedim(0, -1))


def _draw_matches(axes: Axes, image: Tensor, matches: Tensor, colors: Tensor) -> None:
    picture = overlay(image, matches, colors)
    axes.imshow(_pixels(picture))
    if max(matches.shape) > WRITTEN:
        return
    height, width = picture.shape[1] / matches.shape[0], picture.shape[2] / matches.shape[1]
    outline = {"facecolor": "white", "alpha": 0.6, "pad": 0.4, "linewidth": 0}
    for i, row in enumerate(matches.tolist()):
        for j, template in enumerate(row):
            x, y = (j + 0.5) * width - 0.5, (i + 0.5) * height - 0.5
            text = str(template) if template >= 0 else "-"
            axes.text(x, y, text, size=6.5, ha="center", va="center", bbox=outline)


def _draw_lengths(figure: Figure, axes: Any, maps: tuple[Tensor, Tensor]) -> None:
    """Each column has its own scale, which begins at 0."""
    for column, side in zip(axes.T, maps, strict=True):
        longest = float(side.max()) or 1.0
        drawn = [
            cell.imshow(drawable(lengths), vmin=0, vmax=longest, cmap="viridis")
            for cell, lengths in zip(column, side, strict=True)
        ]
        bar = figure.colorbar(drawn[-1], ax=column[-1], location="bottom", aspect=10, pad=0.05)
        bar.ax.tick_params(labelsize=7)
        bar.ax.locator_params(nbins=4)


def _legend(figure: Figure, matches: Tensor, colors: Tensor, top: int) -> None:
    from matplotlib.patches import Patch

    order = frequent(matches, len(colors))
    positions = matches.numel()
    entries: list[tuple[RGB, str]] = []
    for template in order[:top]:
        share = float((matches == template).sum()) / positions
        entries.append((rgb(colors[template]), f"{template} ({share:.0%})"))
    rest = float(sum((matches == k).sum() for k in order[top:])) / positions
    if len(order) > top:
        entries.append((OTHERS, f"{len(order) - top} others ({rest:.0%})"))
    none = float((matches < 0).sum()) / positions
    handles = [Patch(color=f"#{bytes(color).hex()}", label=label) for color, label in entries]
    if none:
        handles.append(Patch(facecolor="white", edgecolor="grey", label=f"-: none ({none:.0%})"))
    title = "template (share of these positions)"
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, title=title)


def plot_usage(usage: TemplateUsage) -> Figure:
    """At how many positions each template fires, and is the best match.

    Templates are ordered by how often they fire. Each curve is a share of all positions on a
    logarithmic scale; the dashed line is an even use. The title counts the templates that never
    fire or are never the best match.

    Args:
        usage: from :func:`template_usage`.

    Returns:
        The figure.

    Raises:
        MissingPackageError: without matplotlib, which the extra ``viz`` installs.

    Example:
        >>> import torch
        >>> from kdlayers.viz import TemplateUsage, plot_usage
        >>> usage = TemplateUsage("layer4", torch.tensor([8, 5, 0]), torch.tensor([7, 1, 0]), 8)
        >>> plot_usage(usage).axes[0].get_xlabel()
        'templates, by how often they fire'
    """
    figure = new_figure("plot_usage", 7.0, 3.2)
    axes = figure.subplots()
    templates, silent = len(usage.fires), len(usage.silent)
    order = usage.fires.cpu().argsort(descending=True, stable=True)
    counted = (usage.fires.cpu(), usage.best.cpu())
    fires, best = (drawable(100 * n[order].double() / usage.positions) for n in counted)
    edges = [rank + 0.5 for rank in range(templates + 1)]
    seen = [share for share in (*fires, *best) if share]
    floor = min([*seen, 100 / templates]) / 3
    for shares, color, label in (
        (fires, "#9ecae1", "fires"),
        (best, "#d55e00", "is the best match"),
    ):
        axes.stairs(shares, edges, baseline=floor, fill=True, color=color, label=label)
    axes.axhline(
        100 / templates, color="black", linewidth=0.8, linestyle="--", label="best, if even"
    )
    axes.set_yscale("log")
    axes.set_ylim(floor, 130)
    axes.set_xlim(0.5, templates + 0.5)
    axes.set_xlabel("templates, by how often they fire")
    axes.set_ylabel("% of positions")
    unused = int((usage.best == 0).sum())
    counts = f"{silent} of {templates} templates never fire, {unused} are never the best"
    axes.set_title(f"KD layer at {usage.name}: {counts}", fontsize=10)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure
