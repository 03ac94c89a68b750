"""What kdlayers.viz paints, tabulates and draws."""

import math
import re
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlayers import DecisionTargets, viz
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    MissingPackageError,
    NotFittedError,
    ShapeError,
)
from tests.nets import batch
from tests.test_docs import documented, public, resolve
from tests.viz.test_view import net, view_of

__all__ = ["net"]  # a fixture
DOCS = Path(__file__).parents[2] / "docs"


# --- colours ----------------------------------------------------------------------------------


def test_most_frequent_templates_get_colors_of_their_own():
    matches = torch.tensor([[3, 3, 3], [1, 1, 0], [-1, -1, -1]])
    colors = viz.template_colors(matches, 5, top=2)
    assert torch.equal(colors[0], colors[2])
    assert len({tuple(colors[k].tolist()) for k in (0, 1, 3)}) == 3
    everyone = viz.template_colors(torch.arange(7), 7)
    assert len({tuple(c) for c in everyone.tolist()}) == 7


def test_overlay_paints_each_region():
    matches = torch.tensor([[0, 1, -1], [2, 2, 0]])
    colors = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    image = torch.randint(0, 256, (3, 4, 9), dtype=torch.uint8)
    picture = viz.overlay(image, matches, colors, alpha=0.5)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 4, 9)
    for i, j in product(range(4), range(9)):
        k = matches[i // 2, j // 3].item()
        old = image[:, i, j].double()
        wanted = old if k < 0 else 0.5 * old + 0.5 * colors[k].double()
        assert (picture[:, i, j].double() - wanted).abs().max() <= 1


def test_overlay_of_grey_and_of_floats():
    matches = torch.full((2, 2), -1)
    grey = torch.rand(1, 6, 6)
    picture = viz.overlay(grey, matches)
    assert torch.equal(picture, (grey * 255).round().to(torch.uint8).expand(3, 6, 6))


# --- tables over classes ----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 999))
def test_strongest_pairs_are_those_of_a_sorted_list(classes, top, seed):
    table = torch.randn(classes, classes, generator=torch.Generator().manual_seed(seed))
    names = [f"class {c}" for c in range(classes)]
    off = [(i, j) for i in range(classes) for j in range(classes) if i != j]
    off.sort(key=lambda place: -abs(table[place].item()))
    found = viz.strongest_pairs(table, names, top=top)
    assert [(p.row, p.column) for p in found] == off[:top]
    for pair in found:
        assert pair.value == table[pair.row, pair.column].item()
        assert pair.names == (names[pair.row], names[pair.column])


@pytest.fixture(scope="module")
def decisions():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    features = torch.randn(400, 6, generator=generator)
    features[:, 0] += labels  # neighbouring classes overlap
    targets = DecisionTargets(subclasses=3, components=2).fit([(features, labels)])
    return targets, features, labels


def test_class_decisions_are_decisions_counted_over_rows(decisions):
    targets, features, labels = decisions
    z = features @ targets.projection.T + targets.shift
    nearest = torch.cdist(z, targets.prototypes).argmin(1) // 3
    counted = torch.zeros(4, 4)
    for own, other in zip(labels.tolist(), nearest.tolist(), strict=True):
        counted[own, other] += 1
    counted /= counted.sum(1, keepdim=True)
    torch.testing.assert_close(viz.class_decisions(targets), counted, rtol=0, atol=1e-5)


# --- figures ----------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _needs_matplotlib(request):
    if "plot" in request.node.name or "page" in request.node.name:
        pytest.importorskip("matplotlib")


def test_plot_matches_has_a_row_an_image(net):
    images, _ = batch(size=3)
    view = viz.layer_view(net, images, "first")
    figure = viz.plot_matches(view, images.sigmoid())
    assert len(figure.axes) == 3 * 6 + 2
    assert [axes.get_title() for axes in figure.axes[:2]] == ["image", "best template"]
    assert figure.get_suptitle() == "KD layer at first, 7 templates"
    written = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert written == [str(k) if k >= 0 else "-" for k in viz.match_map(view).flatten().tolist()]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    most = viz.match_map(view).flatten().mode().values.item()
    assert labels[0].startswith(f"{most} (")


def test_plot_matches_groups_the_rest_and_the_unmatched():
    p = torch.zeros(1, 2, 8, 12)
    for position in range(12):
        p[0, position // 8, position % 8, position] = 1.0
    figure = viz.plot_matches(view_of(p, p), torch.rand(1, 3, 8, 8), top=3)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["0 (6%)", "1 (6%)", "2 (6%)", "9 others (56%)", "-: none (25%)"]
    assert not any(axes.texts for axes in figure.axes)  # 8 positions a side: too many for numbers


def test_plot_usage_shows_shares():
    counts = torch.tensor([5, 0, 40, 10]), torch.tensor([5, 0, 30, 0])
    figure = viz.plot_usage(viz.TemplateUsage("last", *counts, 80))
    axes = figure.axes[0]
    fires, best = (stairs.get_data().values.tolist() for stairs in axes.patches)
    assert fires == pytest.approx([50, 12.5, 6.25, 0])
    assert best == pytest.approx([37.5, 0, 6.25, 0])
    assert axes.get_title() == "KD layer at last: 1 of 4 templates never fire, 2 are never the best"
    assert axes.get_ylabel() == "% of positions"
    assert axes.get_yscale() == "log"


def test_plot_decisions_separates_and_names_classes(decisions):
    targets, *_ = decisions
    names = ["cat", "dog", "car", "bus"]
    figure = viz.plot_decisions(targets, names, top=4)
    image, pairs = figure.axes[:2]
    drawn = torch.tensor(image.images[0].get_array()).square()
    torch.testing.assert_close(drawn, targets.decisions)
    edges = sorted(line.get_ydata()[0] for line in image.lines if line.get_xdata() == [0, 1])
    assert edges == [2.5, 5.5, 8.5]
    assert [label.get_text() for label in image.get_xticklabels()] == names
    assert list(image.get_yticks()) == [1, 4, 7, 10]
    wanted = viz.strongest_pairs(viz.class_decisions(targets), names, top=4)
    said = [f"{pair.names[0]} taken for {pair.names[1]}" for pair in wanted]
    assert [label.get_text() for label in pairs.get_yticklabels()] == said
    widths = [bar.get_width() for bar in pairs.patches]
    assert widths == pytest.approx([100 * pair.value for pair in wanted])


def test_plot_decisions_of_many_classes_has_neither_lines_nor_names():
    batches = [(torch.randn(124, 3), torch.arange(124) % 31)]
    figure = viz.plot_decisions(DecisionTargets(1, components=1).fit(batches), top=3)
    image, pairs = figure.axes[:2]
    assert image.get_ylabel() == "belongs to (sub-classes of 31 classes)"
    assert list(image.lines) == list(image.get_yticks()) == []
    assert len(pairs.patches) == 3


def test_plot_relations_leaves_the_diagonal_out():
    relations = torch.tensor([[5.0, 0.1, -0.4], [0.0, 6.0, 0.2], [0.0, 0.0, 7.0]])
    figure = viz.plot_relations(relations, ["cat", "dog", "car"])
    image, pairs = figure.axes[:2]
    assert image.images[0].get_clim() == pytest.approx((-0.4, 0.4))
    shown = image.images[0].get_array()
    assert [bool(shown.mask[i, i]) for i in range(3)] == [True] * 3
    assert image.get_title() == "W; diagonal, in grey: 5.00 to 7.00"
    said = [label.get_text() for label in pairs.get_yticklabels()]
    assert said == ["cat from car", "dog from car", "cat from dog"]


def test_plot_relations_of_an_untrained_matrix(tmp_path):
    figure = viz.plot_relations(torch.eye(40))
    assert figure.axes[1].texts[0].get_text() == "none"
    assert list(figure.axes[0].get_yticks()) == []  # too many classes to name
    figure.savefig(tmp_path / "relations.png")
    assert (tmp_path / "relations.png").stat().st_size > 1000


def drawn_matches():
    x, p = torch.randn(1, 2, 2, 4), torch.rand(1, 2, 2, 3)
    return viz.plot_matches(viz.LayerView("last", x, x, p, p), torch.rand(1, 3, 8, 8))


def drawn_usage():
    counts = torch.tensor([2, 1])
    return viz.plot_usage(viz.TemplateUsage("last", counts, counts, 4))


def drawn_decisions():
    batches = [(torch.randn(20, 2), torch.arange(20) % 2)]
    return viz.plot_decisions(DecisionTargets(1, components=1).fit(batches))


def drawn_relations():
    return viz.plot_relations(torch.eye(2))


@pytest.mark.parametrize("draw", [drawn_matches, drawn_usage, drawn_decisions, drawn_relations])
def test_without_matplotlib_every_figure_says_what_to_install(monkeypatch, draw):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    asked = draw.__name__.replace("drawn", "plot")
    said = rf"{asked}\(\) needs matplotlib, .*; run pip install matplotlib, or"
    with pytest.raises(MissingPackageError, match=said) as caught:
        draw()
    assert isinstance(caught.value, ImportError)


def test_plot_matches_refuses_other_images(net):
    images, _ = batch()
    with pytest.raises(ShapeError, match=r"images must be the 6 images of the view"):
        viz.plot_matches(viz.layer_view(net, images, "last"), images[:2])


# --- wrong input ------------------------------------------------------------------------------


def test_wrong_maps_and_colors_are_refused():
    image, matches = torch.rand(3, 8, 8), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(ArgumentError, match=r"values from -2 to .* image \* std \+ mean"):
        viz.overlay(torch.full((3, 8, 8), -2.0), matches)
    with pytest.raises(ArgumentError, match="values from nan to nan"):
        viz.overlay(torch.full((3, 8, 8), math.nan), matches)
    with pytest.raises(ShapeError, match=r"take one image of a batch, images\[0\]"):
        viz.overlay(image[None], matches)
    with pytest.raises(ShapeError, match=r"take one of a batch, match_map\(view\)\[0\]"):
        viz.overlay(image, matches[None])
    with pytest.raises(ArgumentTypeError, match="matches must be an integer tensor"):
        viz.overlay(image, matches.float())
    with pytest.raises(ArgumentTypeError, match=r"uint8 or floating-point, got torch\.int64"):
        viz.overlay(image.long(), matches)
    with pytest.raises(ArgumentError, match=r"alpha is an opacity in 0\.\.1, got 2"):
        viz.overlay(image, matches, alpha=2)
    with pytest.raises(ArgumentError, match="has template 4, but there are 2 colors"):
        viz.overlay(image, matches + 4, torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(ShapeError, match=r"colors must be uint8 \[K, 3\], got torch\.float32"):
        viz.overlay(image, matches, torch.zeros(2, 3))
    with pytest.raises(ArgumentError, match=r"top must be in 1\.\.7, the number of colours, got 8"):
        viz.template_colors(matches, 3, top=8)
    with pytest.raises(ArgumentError, match="has template 4, but num_templates is 3"):
        viz.template_colors(matches + 4, 3)


def test_wrong_tables_are_refused():
    with pytest.raises(ShapeError, match=r"a table over classes must be \[C, C\], got \(2, 3\)"):
        viz.strongest_pairs(torch.rand(2, 3))
    with pytest.raises(ArgumentError, match="there are 2 classes, but 1 class_names"):
        viz.strongest_pairs(torch.eye(2), ["cat"])
    with pytest.raises(ArgumentError, match="top must be 1 or more, got 0"):
        viz.strongest_pairs(torch.eye(2), top=0)
    with pytest.raises(ArgumentError, match="NaN or infinite entries: did training diverge"):
        viz.strongest_pairs(torch.full((2, 2), math.nan))
    with pytest.raises(NotFittedError, match="these DecisionTargets are not fitted yet"):
        viz.class_decisions(DecisionTargets())


# --- the docs ----------------------------------------------------------------------------------


def test_every_public_name_is_documented():
    entries = [resolve(name) for name in documented()]
    assert [n for n, v in public(viz).items() if not any(v is e for e in entries)] == []
    assert all(value.__doc__ for value in public(viz).values())


def test_docs_show_small_figures_that_exist():
    pages = [path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))]
    shown = {
        name
        for text in pages
        for name in re.findall(r"(?:\(|^```{image} )(figures/[^)\n]+)", text, re.M)
    }
    assert len(shown) >= 4
    assert sum((DOCS / name).stat().st_size for name in shown) < 600_000
    assert {f"figures/{file.name}" for file in (DOCS / "figures").iterdir()} == shown
