"""Which axis of a module's output holds the channels, and how positions form a grid."""

from dataclasses import dataclass
from math import isqrt, sqrt
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers.errors import LayoutError, ShapeError

Kind: TypeAlias = Literal["NCHW", "NHWC", "tokens", "vector"]


@dataclass(frozen=True)
class Layout:
    """How to read a tensor: its kind, and for tokens the prefix and the grid of the example."""

    kind: Kind
    prefix: int = 0
    grid: tuple[int, int] = (1, 1)

    @property
    def channel_dim(self) -> int:
        """Axis of the channels."""
        return 1 if self.kind in ("NCHW", "vector") else -1

    def to_grid(self, tensor: Tensor) -> Tensor:
        """``tensor`` as ``[B, H, W, C]``; prefix tokens are left out."""
        if self.kind == "NCHW":
            return tensor.movedim(1, -1)
        if self.kind == "NHWC":
            return tensor
        if self.kind == "vector":
            return tensor[:, None, None]
        tokens = tensor[:, self.prefix :]
        batch, count, channels = tokens.shape
        return tokens.reshape(batch, *self._token_grid(count), channels)

    def _token_grid(self, count: int) -> tuple[int, int]:
        height, width = self.grid
        if height * width != count:
            # Another resolution than the example's, of the same proportions.
            growth = sqrt(count / (height * width))
            height, width = round(height * growth), round(width * growth)
        if height * width != count:
            raise ShapeError(
                f"{count} tokens do not form a grid of the proportions "
                f"{self.grid[0]}:{self.grid[1]} seen at attach; attach with example= of the "
                "images' proportions"
            )
        return height, width

    def __str__(self) -> str:
        return f"tokens+{self.prefix}" if self.kind == "tokens" and self.prefix else self.kind


def find_layout(
    name: str, module: nn.Module, root: nn.Module, shape: tuple[int, ...], image: tuple[int, int]
) -> Layout:
    """Layout of the output of ``module``, of ``shape``, for images of height and width ``image``.

    Raises:
        LayoutError: if the axes cannot be told apart.
    """
    if len(shape) == 2:
        return Layout("vector")
    if len(shape) == 3:
        return _token_layout(name, root, shape, image)
    if len(shape) == 4:
        return _map_layout(name, module, root, shape)
    raise LayoutError(
        f"the output of {name!r} has shape {shape}; kdlayers reads maps [B, C, H, W] or [B, H, W, "
        "C], tokens [B, L, C] and vectors [B, C]; choose another point, find_points(model) lists "
        "them"
    )


def _token_layout(
    name: str, root: nn.Module, shape: tuple[int, ...], image: tuple[int, int]
) -> Layout:
    if any(type(module).__name__ == "Unroll" for module in root.modules()):
        raise LayoutError(
            f"the tokens of {name!r} are not in raster order: {type(root).__name__} unrolls its "
            "windows, so they cannot be matched with another model's positions; use losses on the "
            "logits with this model"
        )
    length = shape[1]
    stated = getattr(root, "num_prefix_tokens", None)
    prefixes = [stated] if isinstance(stated, int) else []
    # A class token, a distillation token beside it, four registers with a class token or without.
    for prefix in (*prefixes, 0, 1, 2, 4, 5):
        grid = _proportional_grid(length - prefix, image)
        if grid:
            return Layout("tokens", prefix, grid)
    raise LayoutError(
        f"the {length} tokens of {name!r} form no grid of the image's proportions "
        f"{image[0]}:{image[1]}, with or without up to 5 prefix tokens; choose another point, "
        "find_points(model) lists them"
    )


def _proportional_grid(count: int, image: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of ``count`` tokens in the image's proportions, up to rounding."""
    if count < 1:
        return None
    height = isqrt(count * image[0] // image[1])
    for rows in (height, height + 1):
        if (
            rows
            and count % rows == 0
            and abs(count // rows * image[0] - rows * image[1]) < max(image)
        ):
            return rows, count // rows
    return None


def _map_layout(name: str, module: nn.Module, root: nn.Module, shape: tuple[int, ...]) -> Layout:
    _, first, second, third = shape
    channels = _norm_channels(module)
    if second == third and first != second:
        return Layout("NCHW")
    if first == second and third != second:
        return Layout("NHWC")
    if channels is not None and channels[0] == "NCHW" and first == channels[1]:
        return Layout("NCHW")
    if channels is not None and channels[0] == "NHWC" and third == channels[1]:
        return Layout("NHWC")
    stated = getattr(root, "output_fmt", None)  # timm's statement about the whole model
    for kind in ("NCHW", "NHWC"):
        if kind in (stated, getattr(stated, "value", None)):
            return Layout(kind)
    raise LayoutError(
        f"the output of {name!r} has shape {shape}: it cannot be told which axis holds the "
        "channels; pass example= with images of another size, for instance of 3/2 the height"
    )


def _norm_channels(module: nn.Module) -> tuple[Kind, int] | None:
    """Layout and channels that the last convolution or norm inside ``module`` works on."""
    found: tuple[Kind, int] | None = None
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            found = ("NCHW", part.out_channels)
        elif isinstance(part, nn.BatchNorm2d):
            found = ("NCHW", part.num_features)
        elif type(part) is nn.LayerNorm:
            found = ("NHWC", part.normalized_shape[-1])
    return found


def pool(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """``[B, H, W, C]`` average-pooled to ``size``; unchanged if it has that size already."""
    if tuple(grid.shape[1:3]) == size:
        return grid
    return F.adaptive_avg_pool2d(grid.movedim(-1, 1), size).movedim(1, -1)


def common_size(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """The smaller of two grid sizes, axis by axis."""
    return min(first[0], second[0]), min(first[1], second[1])
