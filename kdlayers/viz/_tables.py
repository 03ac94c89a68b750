"""Figures of tables over classes: the teacher's decisions, and AEKT's relations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdlayers._targets import DecisionTargets
from kdlayers.viz._canvas import drawable, new_figure
from kdlayers.viz._pairs import (
    Pair,
    check_square,
    class_decisions,
    fitted_tables,
    names_of,
    strongest_pairs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 30
"""Up to this many classes have their names along the axes, and lines between them."""


def plot_decisions(
    targets: DecisionTargets, class_names: Sequence[str] | None = None, *, top: int = 10
) -> Figure:
    """The teacher's decisions among sub-classes as an image, and the classes it confuses most.

    On the left P, ``[K, K]``: the row is the sub-class that a position belongs to, the column the
    one that the teacher takes it for. Lines separate up to 30 classes. Shades show the square root,
    so that rare decisions are visible. On the right :func:`strongest_pairs` of
    :func:`class_decisions`.

    Args:
        targets: the targets of a point, after ``kd.fit``.
        class_names: C names; default: the indices. Above 30 classes only the pairs have names.
        top: largest number of pairs. Default 10.

    Returns:
        The figure.

    Raises:
        MissingPackageError: without matplotlib, which the extra ``viz`` installs.
        NotFittedError: before ``fit``.
        ArgumentError: if the number of names is not C, or ``top`` is below 1.

    Example:
        >>> import torch
        >>> from kdlayers import DecisionTargets, viz
        >>> features, labels = torch.randn(60, 4), torch.arange(60) % 3
        >>> targets = DecisionTargets(subclasses=2, components=2).fit([(features, labels)])
        >>> figure = viz.plot_decisions(targets, ["cat", "dog", "car"])
        >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
        ['cat', 'dog', 'car']
    """
    decisions, counts = fitted_tables(targets)
    classes, subclasses = counts.shape
    names = names_of(class_names, classes)
    pairs = strongest_pairs(class_decisions(targets), names, top=top)
    figure, left, right = _two_sides("plot_decisions")
    drawn = _image(left, decisions.sqrt(), names, vmin=0, vmax=1, cmap="magma_r")
    edges = range(1, classes) if classes <= NAMED else ()
    for edge in edges:
        for line in (left.axhline, left.axvline):
            line(edge * subclasses - 0.5, color="#888888", linewidth=0.5)
    left.set_ylabel(f"belongs to (sub-classes of {classes} classes)")
    left.set_xlabel("teacher takes it for")
    left.set_title(f"P, {len(decisions)} sub-classes", fontsize=10)
    bar = figure.colorbar(drawn, ax=left, shrink=0.8, label="share of the row")
    shares = (0.0, 0.01, 0.05, 0.2, 0.5, 1.0)
    bar.set_ticks([share**0.5 for share in shares], labels=[f"{share:.0%}" for share in shares])
    percent = [Pair(p.row, p.column, 100 * p.value, p.names) for p in pairs]
    _draw_pairs(right, percent, "taken for")
    right.set_xlabel("% of the class's positions")
    right.set_title("classes confused most", fontsize=10)
    return figure


def plot_relations(
    relations: Tensor, class_names: Sequence[str] | None = None, *, top: int = 10
) -> Figure:
    """AEKT's matrix as an image, and its strongest pairs by name.

    Row i holds the weights of the student's logits in the logit of class i that is compared with
    the teacher's. The matrix starts as the identity. To show what was learnt off the diagonal, the
    colours reach as far as the largest entry there, and the diagonal is grey.

    Args:
        relations: ``[C, C]``, from :meth:`AEKTLoss.relations <kdlayers.AEKTLoss.relations>`.
        class_names: C names; default: the indices. Above 30 classes only the pairs have names.
        top: largest number of pairs. Default 10.

    Returns:
        The figure.

    Raises:
        MissingPackageError: without matplotlib, which the extra ``viz`` installs.
        ShapeError: if the matrix is not square.
        ArgumentError: if the number of names is not C, ``top`` is below 1, or an entry is not
            finite.

    Example:
        >>> import torch
        >>> from kdlayers.viz import plot_relations
        >>> relations = torch.eye(3) + 0.1 * torch.randn(3, 3)
        >>> figure = plot_relations(relations, ["cat", "dog", "car"])
        >>> figure.axes[0].get_xlabel()
        "student's logit"
    """
    relations = check_square(relations).detach().cpu()
    names = names_of(class_names, len(relations))
    pairs = strongest_pairs(relations, names, top=top)
    limit = abs(pairs[0].value) if pairs else 1.0
    figure, left, right = _two_sides("plot_relations")
    left.set_facecolor("#bbbbbb")
    shown = relations.float().clone().fill_diagonal_(float("nan"))  # not drawn, so grey shows
    drawn = _image(left, shown, names, vmin=-limit, vmax=limit, cmap="RdBu_r")
    left.set_xlabel("student's logit")
    left.set_ylabel("logit compared with the teacher's")
    diagonal = relations.diagonal()
    between = f"{float(diagonal.min()):.2f} to {float(diagonal.max()):.2f}"
    left.set_title(f"W; diagonal, in grey: {between}", fontsize=10)
    figure.colorbar(drawn, ax=left, shrink=0.8, label="weight")
    _draw_pairs(right, pairs, "from")
    right.set_xlabel("weight")
    right.set_title("strongest pairs", fontsize=10)
    return figure


def _two_sides(caller: str) -> tuple[Figure, Axes, Axes]:
    figure = new_figure(caller, 9.0, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    return figure, left, right


def _image(axes: Axes, table: Tensor, names: Sequence[str], **colors: Any) -> Any:
    """Draws a table with the names at the middle of each class's rows, unless they are many."""
    drawn = axes.imshow(drawable(table), interpolation="nearest", **colors)
    shown, size = list(names) if len(names) <= NAMED else [], len(table) // len(names)
    middles = [size * index + (size - 1) / 2 for index in range(len(shown))]
    axes.set_yticks(middles, shown)
    axes.set_xticks(middles, shown, rotation=90 if max(map(len, shown), default=0) > 2 else 0)
    axes.tick_params(length=0, labelsize=8)
    return drawn


def _draw_pairs(axes: Axes, pairs: Sequence[Pair], word: str) -> None:
    """Bars, the strongest at the top."""
    if not pairs:
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes)
        axes.set_yticks([])
        return
    colors = ["#b2182b" if pair.value > 0 else "#2166ac" for pair in pairs]
    axes.barh(range(len(pairs)), [pair.value for pair in pairs], color=colors)
    axes.set_yticks(range(len(pairs)), [f"{p.names[0]} {word} {p.names[1]}" for p in pairs])
    axes.tick_params(labelsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
