"""Squared distances of rows to centres by matrix products."""

import torch
from torch import Tensor

_CHUNK = 2**24
"""Entries of the largest matrix of distances, 64 MiB in float32."""


def closeness(rows: Tensor, centers: Tensor) -> Tensor:
    r"""Minus half the squared distances, but for a constant of each row: [n, D], [K, D] to [n, K].

    .. math:: x \cdot c_k - \tfrac12 \|c_k\|^2 = -\tfrac12 \|x - c_k\|^2 + \tfrac12 \|x\|^2

    Taken round the mean of the centres, so that a large common mean does not eat the digits.
    """
    return affine(*balanced(rows, centers))


def balanced(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and centres round the centres' mean, and the bias that `affine` makes closeness of."""
    origin = centers.mean(dim=0)
    rows, centers = rows - origin, centers - origin
    return rows, centers, centers.square().sum(dim=1) * -0.5


def affine(rows: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """``rows @ matrix.T + bias``, also where CUDA may round the factors to TensorFloat-32."""
    if rows.dtype == torch.float32 and rows.is_cuda and _tensor_float():
        return _split_product(rows, matrix) + bias
    return torch.addmm(bias, rows, matrix.T)


def nearest(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centre and its index, each [n]; the first one of equals."""
    distances, indices = [], []
    for part in rows.split(max(1, _CHUNK // len(centers))):
        index = closeness(part, centers).argmax(dim=1)
        # By subtraction, so that a row at its centre has distance 0.
        distances.append((part - centers[index]).square().sum(dim=1))
        indices.append(index)
    return torch.cat(distances), torch.cat(indices)


def sums_by_index(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of the rows [n, D] of each index, in float64: [size, D]; the same at every run."""
    sums = rows.new_zeros(size, rows.shape[1], dtype=torch.float64)
    if rows.is_cuda:  # there index_add_ adds in any order, index_put_ sorts first
        return sums.index_put_((index,), rows.double(), accumulate=True)
    return sums.index_add_(0, index, rows.double())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _tensor_float() -> bool:
    """Whether the user lets CUDA round the factors of float32 products to 10 bits."""
    flags = torch.backends.cuda.matmul
    precision = getattr(flags, "fp32_precision", None)  # torch 2.9 and later
    return bool(flags.allow_tf32) if precision is None else precision == "tf32"


def _split_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` to float32 accuracy out of products whose factors are rounded to 10 bits."""
    high_a, high_b = _high_bits(a), _high_bits(b)
    low_a, low_b = a - high_a, b - high_b
    return high_a @ high_b.T + (high_a @ low_b.T + low_a @ high_b.T)


def _high_bits(values: Tensor) -> Tensor:
    """The values cut to the 10 bits of mantissa that TensorFloat-32 keeps."""
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)
