"""Squared distances of rows to centres by matrix products."""

import torch
from torch import Tensor

_CHUNK, _CHUNK_ON_DEVICE = 2**20, 2**24
"""Entries of the largest matrix of distances: 4 MiB in float32, which stay in the cache of a CPU;
64 MiB on other devices, where each call costs more than memory does."""
_LANES = 32
"""On a CPU the largest of many columns is found by maxima over this many interleaved parts first:
those are vectorised, whereas a maximum with its index takes longer than the product itself."""
SUMMED = 2**14
"""Rows added up in their own precision before the sum goes to float64."""


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


class Search:
    """Centres [K, D] laid out to find the nearest one of each row; the first one of equals.

    Args:
        centers: the centres.
        origin: [D], near the centres; what rows are given relative to. Default: their mean.
    """

    def __init__(self, centers: Tensor, origin: Tensor | None = None) -> None:
        self.origin = centers.mean(dim=0) if origin is None else origin
        matrix = centers - self.origin
        bias = matrix.square().sum(dim=1) * -0.5
        on_cpu = centers.device.type == "cpu"
        self.size = len(centers)
        self._depth = -(-self.size // _LANES) if on_cpu and self.size >= 4 * _LANES else 0
        self._rows = max(1, (_CHUNK if on_cpu else _CHUNK_ON_DEVICE) // self.size)
        self._matrix, self._bias = self._interleave(matrix, 0.0), self._interleave(bias, -torch.inf)

    def best(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Largest `closeness` and its index, for rows [n, D] less the origin: each [n]."""
        parts = [self._best(part) for part in rows.split(self._rows)]
        return torch.cat([value for value, _ in parts]), torch.cat([index for _, index in parts])

    def _best(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = affine(rows, self._matrix, self._bias)
        if not self._depth:
            value, index = scores.max(dim=1)
            return value, index
        lanes = scores.view(len(rows), self._depth, _LANES)
        value, lane = lanes.amax(dim=1).max(dim=1)
        column = lanes.gather(2, lane.view(-1, 1, 1).expand(-1, self._depth, 1)).squeeze(2)
        return value, lane * self._depth + column.max(dim=1).indices

    def _interleave(self, values: Tensor, fill: float) -> Tensor:
        """Centre ``lane * depth + step`` to row ``step * lanes + lane``: ties go to the first."""
        if not self._depth:
            return values
        missing = self._depth * _LANES - self.size
        padded = torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])
        shape = (_LANES, self._depth, *values.shape[1:])
        return padded.view(shape).transpose(0, 1).reshape(padded.shape)


def one_hot_of_largest(scores: Tensor) -> Tensor:
    """1 at the largest entry of each row ``[n, K]`` (the first on ties), else 0.

    A row without a finite largest entry, as NaN or infinite features give, holds a NaN instead of
    the 1, so that a loss computed from it is NaN too.
    """
    value, index = scores.max(dim=-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, index, value * 0 + 1)


def nearest_index(rows: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest centre of each row, [n]; the first one of equals."""
    search = Search(centers)
    return torch.cat([search.best(part - search.origin)[1] for part in rows.split(SUMMED)])


def nearest(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centre and its index, each [n]; the first one of equals."""
    index = nearest_index(rows, centers)
    # By subtraction, so that a row at its centre has distance 0.
    pairs = zip(rows.split(SUMMED), index.split(SUMMED), strict=True)
    return torch.cat([(part - centers[i]).square().sum(dim=1) for part, i in pairs]), index


def sums_by_index(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of the rows [n, D] of each index, in float64: [size, D]; the same at every run."""
    sums = rows.new_zeros(size, rows.shape[1], dtype=torch.float64)
    if rows.is_cuda:  # there index_add_ adds in any order, index_put_ sorts first
        return sums.index_put_((index,), rows.double(), accumulate=True)
    for part, where in zip(rows.split(SUMMED), index.split(SUMMED), strict=True):
        sums += rows.new_zeros(size, rows.shape[1]).index_add_(0, where, part)
    return sums


def _tensor_float() -> bool:
    """Whether the user lets CUDA round the factors of float32 products to 10 bits, or may."""
    if torch.compiler.is_compiling():
        return True  # graphs cannot look; being careful costs two small products more
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
