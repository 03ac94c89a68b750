"""Finds the channel axis of a module's output, and the grid that its positions form."""

from collections.abc import Collection
from dataclasses import dataclass, field
from itertools import product
from math import ceil, dist, floor, isqrt, sqrt
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers._models.probe import MOST_PREFIXES, Growth, Shape
from kdlayers.errors import LayoutError, ShapeError

Kind: TypeAlias = Literal["NCHW", "NHWC", "tokens", "vector"]

Size: TypeAlias = tuple[int, int]

# Parameters that are put before the tokens of an image, by their usual names.
_PREFIXES = (
    *("cls_token", "class_token", "class_embedding", "dist_token", "distillation_token"),
    *("reg_token", "register_tokens"),
)


@dataclass(frozen=True)
class Layout:
    """How to read a tensor: its kind; for tokens, also the number of prefix tokens and the grid."""

    kind: Kind
    prefix: int = 0
    grid: Size = (1, 1)
    image: Size | None = field(default=None, compare=False)
    """Height and width of the images for which the grid is ``grid``."""

    @property
    def channel_dim(self) -> int:
        """Axis of the channels."""
        return 1 if self.kind in ("NCHW", "vector") else -1

    def to_grid(self, tensor: Tensor, image: Size | None = None) -> Tensor:
        """``tensor`` as ``[B, H, W, C]``, without prefix tokens.

        ``image`` is the height and width of the input images. If it is not given, the grid of the
        tokens has the aspect ratio of the example. Tokens that already form a grid are returned
        unchanged.
        """
        if self.kind == "NCHW":
            return tensor.movedim(1, -1)
        if self.kind == "NHWC" or (self.kind == "tokens" and tensor.dim() == 4):
            return tensor
        if self.kind == "vector":
            return tensor[:, None, None]
        tokens = tensor[:, self.prefix :]
        batch, count, channels = tokens.shape
        return tokens.reshape(batch, *self._token_grid(count, image), channels)

    def on_grid(self, tensor: Tensor, image: Size | None) -> Tensor:
        """Tokens as ``to_grid`` returns them for these images; other tensors unchanged."""
        return self.to_grid(tensor, image) if self.kind == "tokens" else tensor

    def _token_grid(self, count: int, image: Size | None) -> Size:
        height, width = self.grid
        if image is not None and self.image is not None:
            if image == self.image and height * width != count:
                raise ShapeError(
                    f"this forward gave {count} tokens, but the example at attach time, whose "
                    f"images were also {image[0]} x {image[1]}, gave {height} x {width} = "
                    f"{height * width}: the model drops or merges tokens in training, so their "
                    "positions are unknown; turn this off (in timm, patch_drop_rate=0), or choose "
                    "a point before it"
                )
            found = self._grid_of(count, image, self.image)
            if found is None:
                raise ShapeError(
                    f"{count} tokens of images of {image[0]} x {image[1]} do not form a grid of "
                    f"the images' proportions; the example at attach time, {self.image[0]} x "
                    f"{self.image[1]}, gave {height} x {width} tokens; call attach_kd with "
                    "example= of the new size; if the model drops or merges tokens in training, "
                    "turn this off (in timm, patch_drop_rate=0)"
                )
            return found
        if height * width != count:
            # Another resolution than that of the example, with the same aspect ratio.
            growth = sqrt(count / (height * width))
            height, width = round(height * growth), round(width * growth)
        if height * width != count:
            raise ShapeError(
                f"{count} tokens do not form a grid with the aspect ratio "
                f"{self.grid[0]}:{self.grid[1]} of attach_kd's example; call attach_kd with "
                "example= of the images' aspect ratio"
            )
        return height, width

    def _grid_of(self, count: int, image: Size, seen: Size) -> Size | None:
        """Rows and columns of ``count`` tokens, if patches have the size found in attach_kd."""
        if image == seen:
            return self.grid
        zoom = [now / then for now, then in zip(image, seen, strict=True)]
        rows, columns = (g * z for g, z in zip(self.grid, zoom, strict=True))
        near = product({floor(rows), ceil(rows)}, {floor(columns), ceil(columns)})
        # The nearest first: 15 x 14 has as many positions as 14 x 15.
        for grid in sorted(near, key=lambda grid: dist(grid, (rows, columns))):
            if grid[0] * grid[1] == count:
                return grid
        found = _proportional_grid(count, image)
        if found is None:
            return None
        # The example's grid was rounded too, by up to a patch. A grid that is farther away is not
        # that of all tokens, but what is left after some were dropped.
        off = [abs(found[0] - rows), abs(found[1] - columns)]
        return found if all(o <= z + 1 for o, z in zip(off, zoom, strict=True)) else None

    def __str__(self) -> str:
        return f"tokens+{self.prefix}" if self.kind == "tokens" and self.prefix else self.kind


def find_layout(
    name: str,
    module: nn.Module,
    root: nn.Module,
    shape: Shape,
    image: Size,
    *,
    growth: Growth | None = None,
    stated: Kind | None = None,
    grids: Collection[Size] = (),
) -> Layout:
    """Layout of the output of ``module``, of ``shape``, for images of height and width ``image``.

    It uses the first of these sources that gives an answer:

    1. ``growth``: a measurement of the axes that grow with the images;
    2. ``stated``: convolutions and norms that returned or received this tensor;
    3. timm's ``output_fmt`` of the model;
    4. ``grids``: the rows and columns of the model's other maps;
    5. the aspect ratio of the axes, unless the number of channels equals that of rows or columns.

    Raises:
        LayoutError: if the channel axis is ambiguous.
    """
    if len(shape) == 2:
        return Layout("vector")
    if len(shape) == 3:
        return _token_layout(name, root, shape, image, growth, grids)
    if len(shape) == 4:
        measured = growth is not None and None not in (growth.height, growth.width)
        kind = measured_kind(growth) if measured else stated
        return Layout(kind or _map_kind(name, module, root, shape, image, growth, grids))
    raise LayoutError(
        f"the output of {name!r} has shape {shape}; kdlayers reads maps [B, C, H, W] or [B, H, W, "
        "C], tokens [B, L, C] and vectors [B, C]; choose another point, find_points(model) lists "
        "them"
    )


def _token_layout(
    name: str,
    root: nn.Module,
    shape: Shape,
    image: Size,
    growth: Growth | None,
    grids: Collection[Size],
) -> Layout:
    if any(map(_unrolls, root.modules())):
        raise LayoutError(
            f"the tokens of {name!r} are not in raster order: {type(root).__name__} unrolls its "
            "windows, so they cannot be matched with another model's positions; use losses on the "
            "logits with this model"
        )
    if growth is not None and 2 in (growth.height, growth.width):
        raise LayoutError(
            f"the output of {name!r} has shape {shape}, and its last axis grows with the images: "
            "it holds positions, not channels; kdlayers reads tokens [B, L, C]; choose another "
            "point, find_points(model) lists them"
        )
    # A class token, also with a distillation token; four registers, with or without a class token.
    stated = _stated_prefixes(root, name)
    prefixes = list(dict.fromkeys((*stated, 0, 1, 2, 4, MOST_PREFIXES)))
    found = _token_grids(shape[1], prefixes, image, grids)
    if not found:
        raise LayoutError(
            f"the {shape[1]} tokens of {name!r} do not form a grid with the image's aspect ratio "
            f"{image[0]}:{image[1]}, with up to 5 prefix tokens or without; choose another point, "
            "find_points(model) lists them"
        )
    found = [way for way in found if _grows(*way, growth)] or found
    # A grid of one position is unlikely if a larger grid also fits.
    found = [way for way in found if way[1] != (1, 1)] or found
    found = [way for way in found if way[0] in stated[:1]] or found
    found = [way for way in found if way[0] in stated] or found
    if len(found) > 1:
        ways = " or ".join(f"{rows} x {c} after {p}" for p, (rows, c) in found)
        raise LayoutError(
            f"the {shape[1]} tokens of {name!r} are ambiguous: they may be a grid of {ways} prefix "
            "tokens; set model.num_prefix_tokens to their number"
        )
    prefix, grid = found[0]
    return Layout("tokens", prefix, grid, image)


def _token_grids(
    length: int, prefixes: Collection[int], image: Size, grids: Collection[Size]
) -> list[tuple[int, Size]]:
    """Possible numbers of prefix tokens, with the grids of the other tokens.

    The grids are those of the model's own maps, because tokens are made from maps. If no map has
    the right number of positions, the grid is computed from the aspect ratio of the images.
    """
    seen = [(p, grid) for p in prefixes for grid in grids if grid[0] * grid[1] == length - p]
    if seen:
        return seen
    made = [(p, _proportional_grid(length - p, image)) for p in prefixes]
    return [(p, grid) for p, grid in made if grid is not None]


def holders(root: nn.Module, name: str) -> list[nn.Module]:
    """The module ``name`` and those that hold it, the innermost first, ``root`` last."""
    parts = name.split(".") if name else []
    paths = (".".join(parts[:end]) for end in range(len(parts), 0, -1))
    return [*map(root.get_submodule, paths), root]


def _stated_prefixes(root: nn.Module, name: str) -> list[int]:
    """Numbers of prefix tokens of the network around module ``name``, perhaps inside a wrapper.

    First timm's attribute, of the outermost module that has it; then the count of parameters with
    usual names, in the innermost module that has any.
    """
    around = holders(root, name)
    stated = [getattr(module, "num_prefix_tokens", None) for module in reversed(around)]
    found = [number for number in stated if isinstance(number, int)][:1]
    counts = (_prefix_parameters(module) for module in around)
    return [*found, *[count for count in counts if count][:1]]


def _prefix_parameters(module: nn.Module) -> int:
    """The number of tokens in the parameters that have the usual names of prefix tokens."""
    own = [p for name, p in module.named_parameters() if name.rsplit(".", 1)[-1] in _PREFIXES]
    return sum(p.shape[1] if p.dim() == 3 else 1 for p in own)


def _unrolls(module: nn.Module) -> bool:
    """Whether this module of a Hiera, of timm or transformers, reorders tokens by windows."""
    return type(module).__name__ == "Unroll" or hasattr(module, "unroll_schedule")


def _grows(prefix: int, grid: Size, growth: Growth | None) -> bool:
    """Whether ``prefix`` and ``grid`` are consistent with the token counts of larger images."""
    if growth is None or len(growth.tall) != 3 or len(growth.wide) != 3:
        return False
    rows, columns = grid
    taller, wider = growth.tall[1] - prefix, growth.wide[1] - prefix
    whole = taller % columns == 0 and wider % rows == 0
    return whole and abs(taller // columns - 2 * rows) < 2 and abs(wider // rows - 2 * columns) < 2


def _proportional_grid(count: int, image: Size) -> Size | None:
    """Rows and columns of ``count`` tokens with the image's aspect ratio, up to rounding."""
    if count < 1:
        return None
    height = isqrt(count * image[0] // image[1])
    for rows in (height, height + 1):
        if rows and count % rows == 0 and _proportional(rows, count // rows, image):
            return rows, count // rows
    return None


def _proportional(rows: int, columns: int, image: Size) -> bool:
    """Whether a grid has the aspect ratio of the images, up to a fraction of a row or column."""
    return abs(columns * image[0] - rows * image[1]) < max(image)


def _map_kind(
    name: str,
    module: nn.Module,
    root: nn.Module,
    shape: Shape,
    image: Size,
    growth: Growth | None,
    grids: Collection[Size],
) -> Kind:
    if growth is not None and None not in (growth.height, growth.width):
        raise LayoutError(
            f"the output of {name!r} has shape {shape}: axis {growth.height} grows with "
            f"the height of the images and axis {growth.width} with their width; kdlayers "
            "reads maps [B, C, H, W] or [B, H, W, C]; choose another point, "
            "find_points(model) lists them"
        )
    said = _maker(module) or _stated_format(root)
    if said is not None:
        return said
    _, first, second, third = shape
    readings: dict[Kind, tuple[int, Size]] = {
        "NCHW": (first, (second, third)),
        "NHWC": (third, (first, second)),
    }
    known: list[Kind] = [kind for kind, (_, grid) in readings.items() if grid in grids]
    if len(known) == 1:
        return known[0]
    fits: list[Kind] = [k for k, (_, grid) in readings.items() if _proportional(*grid, image)]
    if len(fits) == 1 and not known and readings[fits[0]][0] not in readings[fits[0]][1]:
        return fits[0]
    raise LayoutError(
        f"the output of {name!r} has shape {shape}, and it is unclear which axis holds the "
        "channels; pass example= with images of another size, for instance 3/2 of the height"
    )


_AXES: dict[tuple[int, int], Kind] = {(2, 3): "NCHW", (1, 2): "NHWC"}
_MAPS = (
    *(nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm),
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout2d),
)


def stated_kind(module: nn.Module) -> Kind | None:
    """The layout of the maps that this module takes and returns, according to its type."""
    if isinstance(module, _MAPS):
        return "NCHW"
    # Subclasses of LayerNorm may normalise NCHW.
    last = type(module) is nn.Linear or (
        type(module) is nn.LayerNorm and len(module.normalized_shape) == 1
    )
    return "NHWC" if last else None


def measured_kind(growth: Growth | None) -> Kind | None:
    """The layout of a map from the axes that grow with height and width."""
    if growth is None or growth.height is None or growth.width is None:
        return None
    return _AXES.get((growth.height, growth.width))


def _maker(module: nn.Module) -> Kind | None:
    """The layout declared by the last module of a Sequential."""
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return stated_kind(module)


def _stated_format(root: nn.Module) -> Kind | None:
    """The layout that timm declares for the whole model."""
    stated = getattr(root, "output_fmt", None)
    name = getattr(stated, "value", stated)
    return name if name in ("NCHW", "NHWC") else None


def pool(grid: Tensor, size: Size) -> Tensor:
    """``[B, H, W, C]`` average-pooled to ``size``; unchanged if it already has this size."""
    if tuple(grid.shape[1:3]) == size:
        return grid
    return F.adaptive_avg_pool2d(grid.movedim(-1, 1), size).movedim(1, -1)


def common_size(first: Size, second: Size) -> Size:
    """The smaller of two grid sizes, axis by axis."""
    return min(first[0], second[0]), min(first[1], second[1])
