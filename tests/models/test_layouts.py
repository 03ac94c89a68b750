import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlayers._models.layouts import Layout, common_size, find_layout, pool
from kdlayers._models.probe import Growth
from kdlayers.errors import LayoutError, ShapeError


def find(shape, image=(32, 32), module=None, root=None, growth=None):
    module, root = module or nn.Identity(), root or nn.Identity()
    root.tap = module
    return find_layout("tap", module, root, shape, image, growth=growth)


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


def test_a_declared_prefix_takes_precedence():
    # 1 + 4 x 4 tokens could also be 17; 4 registers and a class token leave 2 x 2 of 9 - 5.
    assert find((2, 9, 64), root=Root(num_prefix_tokens=5)).prefix == 5
    root = Root(cls_token=nn.Parameter(torch.zeros(1, 1, 64)))
    root.reg_token = nn.Parameter(torch.zeros(1, 4, 64))
    assert find((2, 9, 64), root=root).prefix == 5
    with pytest.raises(LayoutError, match=r"3 x 3 after 0 or 2 x 2 after 5 .*num_prefix_tokens"):
        find((2, 9, 64))


def test_the_prefix_is_that_of_the_network_around_the_module():
    def network(registers):
        made = Root(cls_token=nn.Parameter(torch.zeros(1, 1, 64)), tap=nn.Identity())
        made.reg_token = nn.Parameter(torch.zeros(1, registers, 64))
        return made

    root = Root(ours=network(4), theirs=network(0))
    layout = find_layout("ours.tap", nn.Identity(), root, (2, 9, 64), (32, 32))
    assert (layout.prefix, layout.grid) == (5, (2, 2))
    root.theirs.num_prefix_tokens = 0  # timm's attribute of a network in a wrapper
    layout = find_layout("theirs.tap", nn.Identity(), root, (2, 9, 64), (32, 32))
    assert (layout.prefix, layout.grid) == (0, (3, 3))


def test_inner_modules_or_declared_layouts_resolve_equal_axes():
    shape = (2, 8, 8, 8)
    assert find(shape, module=nn.Sequential(nn.Conv2d(3, 8, 1))).kind == "NCHW"
    assert find(shape, module=nn.LayerNorm(8)).kind == "NHWC"
    assert find(shape, root=Root(output_fmt="NHWC")).kind == "NHWC"
    with pytest.raises(LayoutError, match="unclear which axis"):
        find(shape)


def test_aspect_ratio_is_ignored_when_channels_equal_rows():
    assert find((2, 48, 64, 128), image=(32, 64)).kind == "NCHW"
    assert find((2, 64, 128, 48), image=(32, 64)).kind == "NHWC"
    for shape in ((2, 64, 64, 128), (2, 64, 128, 64), (2, 64, 128, 128), (2, 64, 128, 256)):
        with pytest.raises(LayoutError, match="unclear which axis"):
            find(shape, image=(32, 64))


@pytest.mark.parametrize(
    ("height", "width", "kind"), [(2, 3, "NCHW"), (1, 2, "NHWC"), (3, 2, None), (1, 3, None)]
)
def test_measured_axes_take_precedence(height, width, kind):
    growth = Growth(height, width, (), ())
    module = nn.LayerNorm(8) if kind == "NCHW" else nn.Conv2d(3, 8, 1)
    if kind is None:
        with pytest.raises(LayoutError, match=f"axis {height} grows with the height"):
            find((2, 8, 8, 8), module=module, growth=growth)
    else:
        assert find((2, 8, 8, 8), module=module, growth=growth).kind == kind


def test_tokens_on_the_last_axis_are_refused():
    growth = Growth(2, 2, (2, 16, 32), (2, 16, 32))
    with pytest.raises(LayoutError, match="holds positions, not channels"):
        find((2, 16, 16), growth=growth)


def test_the_prefix_is_the_one_that_agrees_with_larger_images():
    # 9 tokens may be 3 x 3, or 2 x 2 after a class token and four registers.
    assert find((2, 9, 8), growth=Growth(1, 1, (2, 18, 8), (2, 18, 8))).prefix == 0
    assert find((2, 9, 8), growth=Growth(1, 1, (2, 13, 8), (2, 13, 8))).prefix == 5


@pytest.mark.parametrize("image", [(8, 32), (32, 8), (64, 16), (16, 64), (16, 16), (24, 40)])
def test_tokens_take_the_aspect_ratio_of_the_batch(image):
    rows, columns = image[0] // 4, image[1] // 4
    grid = torch.randn(2, rows, columns, 3)
    layout = find((2, 17, 3), image=(16, 16), root=Root(num_prefix_tokens=1))
    tokens = torch.cat([torch.zeros(2, 1, 3), grid.flatten(1, 2)], 1)
    assert torch.equal(layout.to_grid(tokens, image), grid)
    assert torch.equal(layout.to_grid(layout.on_grid(tokens, image)), grid)


def test_tokens_that_do_not_fit_the_batch_are_an_error():
    layout = find((2, 16, 3), image=(16, 16))
    with pytest.raises(ShapeError, match="18 tokens of images of 24 x 16 do not form a grid"):
        layout.to_grid(torch.zeros(2, 18, 3), (24, 16))


@pytest.mark.parametrize(("image", "grid"), [((240, 236), (15, 14)), ((236, 240), (14, 15))])
def test_rows_and_columns_are_not_exchanged(image, grid):
    layout = Layout("tokens", 0, (14, 14), (232, 232))  # patches of 16, rounded down
    assert layout.to_grid(torch.zeros(1, 210, 3), image).shape == (1, *grid, 3)


@pytest.mark.parametrize(("side", "kept"), [(12, 6), (16, 8), (28, 14)])
def test_the_tokens_left_after_a_drop_are_no_grid_at_another_image_size_either(side, kept):
    layout = Layout("tokens", 0, (14, 14), (224, 224))
    with pytest.raises(ShapeError, match=rf"{kept**2} tokens of images of .* drops or merges"):
        layout.to_grid(torch.zeros(1, kept**2, 3), (16 * side, 16 * side))


@pytest.mark.parametrize(("seen", "side"), [(31, 14), (40, 14), (24, 3)])
def test_grids_that_the_example_rounds_are_found(seen, side):
    layout = Layout("tokens", 0, (seen // 16, seen // 16), (seen, seen))
    assert layout.to_grid(torch.zeros(1, side**2, 3), (16 * side, 16 * side)).shape[1] == side


@pytest.mark.parametrize("count", [4, 9, 36])
def test_fewer_or_more_tokens_than_the_example_of_this_size_gave_are_an_error(count):
    layout = find((2, 17, 3), image=(16, 16), root=Root(num_prefix_tokens=1))
    tokens = torch.zeros(2, 1 + count, 3)
    with pytest.raises(ShapeError, match=rf"gave {count} tokens, but .* gave 4 x 4 = 16: the mode"):
        layout.to_grid(tokens, (16, 16))
    side = int(count**0.5)
    assert layout.to_grid(tokens, (4 * side, 4 * side)).shape == (2, side, side, 3)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((2, 3, 4, 5, 6), "kdlayers reads maps"),
        ((2, 23, 64), "23 tokens of 'tap' do not form a grid"),
        ((2, 3, 4, 5), "unclear which axis"),
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


def test_tokens_of_another_resolution_keep_the_aspect_ratio():
    layout = Layout("tokens", 1, (14, 7))
    assert layout.to_grid(torch.zeros(1, 1 + 8 * 4, 3)).shape == (1, 8, 4, 3)
    with pytest.raises(ShapeError, match="33 tokens do not form a grid with the aspect ratio 14:7"):
        layout.to_grid(torch.zeros(1, 34, 3))


def test_pooling_is_the_mean_of_equal_blocks():
    grid = torch.randn(2, 4, 6, 3, dtype=torch.float64)
    pooled = pool(grid, common_size((4, 6), (2, 8)))
    assert pooled.shape == (2, 2, 6, 3)
    for i in range(2):
        for j in range(6):
            torch.testing.assert_close(pooled[:, i, j], grid[:, 2 * i : 2 * i + 2, j].mean(1))
    assert pool(grid, (4, 6)) is grid
