import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlayers._models.layouts import Layout, common_size, find_layout, pool
from kdlayers.errors import LayoutError, ShapeError


def find(shape, image=(32, 32), module=None, root=None):
    return find_layout("tap", module or nn.Identity(), root or nn.Identity(), shape, image)


class Root(nn.Module):
    def __init__(self, **stated):
        super().__init__()
        for name, value in stated.items():
            setattr(self, name, value)


@pytest.mark.parametrize(
    ("shape", "kind", "prefix", "grid"),
    [
        ((2, 64, 7, 7), "NCHW", 0, None),
        ((2, 7, 7, 64), "NHWC", 0, None),
        ((2, 196, 64), "tokens", 0, (14, 14)),
        ((2, 197, 64), "tokens", 1, (14, 14)),
        ((2, 198, 64), "tokens", 2, (14, 14)),
        ((2, 200, 64), "tokens", 4, (14, 14)),
        ((2, 5, 64), "tokens", 1, (2, 2)),
        ((2, 1, 64), "tokens", 0, (1, 1)),
        ((2, 64), "vector", 0, None),
    ],
)
def test_kinds(shape, kind, prefix, grid):
    layout = find(shape)
    assert (layout.kind, layout.prefix) == (kind, prefix)
    assert grid is None or layout.grid == grid


def test_tokens_of_images_that_are_not_square():
    assert find((2, 140, 64), image=(224, 160)).grid == (14, 10)
    assert find((2, 141, 64), image=(160, 224)) == Layout("tokens", 1, (10, 14))


def test_a_stated_prefix_comes_first():
    # 1 + 4 x 4 tokens could also be 17; 4 registers and a class token leave 2 x 2 of 9 - 5.
    assert find((2, 9, 64), root=Root(num_prefix_tokens=5)).prefix == 5
    assert find((2, 9, 64)).prefix == 0


def test_equal_axes_are_told_apart_by_what_is_inside_or_stated():
    shape = (2, 8, 8, 8)
    assert find(shape, module=nn.Sequential(nn.Conv2d(3, 8, 1))).kind == "NCHW"
    assert find(shape, module=nn.LayerNorm(8)).kind == "NHWC"
    assert find(shape, root=Root(output_fmt="NHWC")).kind == "NHWC"
    with pytest.raises(LayoutError, match="cannot be told which axis"):
        find(shape)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 3, 4, 5, 6), "kdlayers reads maps"),
        ((2, 23, 64), "23 tokens of 'tap' form no grid"),
        ((2, 3, 4, 5), "cannot be told"),
    ],
)
def test_shapes_that_cannot_be_read(shape, sentence):
    with pytest.raises(LayoutError, match=sentence):
        find(shape)


@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    channels=st.integers(1, 4),
    prefix=st.integers(0, 3),
)
@settings(deadline=None)
def test_all_layouts_give_the_same_grid(batch, height, width, channels, prefix):
    grid = torch.randn(batch, height, width, channels)
    tokens = torch.cat([torch.zeros(batch, prefix, channels), grid.flatten(1, 2)], 1)
    assert torch.equal(Layout("NCHW").to_grid(grid.movedim(-1, 1)), grid)
    assert torch.equal(Layout("NHWC").to_grid(grid), grid)
    assert torch.equal(Layout("tokens", prefix, (height, width)).to_grid(tokens), grid)


def test_tokens_of_another_resolution_keep_the_proportions():
    layout = Layout("tokens", 1, (14, 7))
    assert layout.to_grid(torch.zeros(1, 1 + 8 * 4, 3)).shape == (1, 8, 4, 3)
    with pytest.raises(ShapeError, match="33 tokens do not form a grid of the proportions 14:7"):
        layout.to_grid(torch.zeros(1, 34, 3))


def test_pooling_is_the_mean_of_equal_blocks():
    grid = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    pooled = pool(grid, common_size((4, 6), (2, 8)))
    assert pooled.shape == (2, 2, 6, 3)
    for i in range(2):
        for j in range(6):
            torch.testing.assert_close(pooled[:, i, j], grid[:, 2 * i : 2 * i + 2, j].mean(1))
    assert pool(grid, (4, 6)) is grid
