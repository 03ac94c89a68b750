"""Squared distances of rows to centres by matrix products."""

import torch
from torch import Tensor

from kdlayers._utils.chunks import chunks

_LANES = 32
"""On a CPU, the largest of many columns is found via maxima over this many interleaved parts.
These maxima are vectorised; a maximum with its index takes longer than the product itself."""
SUMMED = 2**14
"""Rows that are summed in their own precision before the sum is converted to float64."""


def closeness(rows: Tensor, centers: Tensor) -> Tensor:
    r"""Minus half the squared distances, up to a constant of each row: [n, D], [K, D] to [n, K].

    .. math:: x \cdot c_k - \tfrac12 \|c_k\|^2 = -\tfrac12 \|x - c_k\|^2 + \tfrac12 \|x\|^2

    The mean of the centres is subtracted from rows and centres, because a large common mean would
    cost precision.
    """
    return affine(*balanced(rows, centers))


def balanced(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and centres minus the centres' mean, and the bias for which `affine` is `closeness`."""
    origin = centers.mean(dim=0)
    rows, centers = rows - origin, centers - origin
    return rows, centers, centers.square().sum(dim=1) * -0.5


def affine(rows: Tensor, matrix: Tensor, bias: Tensor) -> Tensor:
    """``rows @ matrix.T + bias`` in float32 even where CUDA may use TensorFloat-32."""
    if rows.dtype == torch.float32 and rows.is_cuda and _tensor_float():
        return _split_product(rows, matrix) + bias
    return torch.addmm(bias, rows, matrix.T)


class Search:
    """Finds the nearest of the centres [K, D] for each row; the first on ties.

    Args:
        centers: the centres.
        origin: [D], near the centres; rows are passed relative to it. Default: the centres' mean.
    """

    def __init__(self, centers: Tensor, origin: Tensor | None = None) -> None:
        self.origin = centers.mean(dim=0) if origin is None else origin
        matrix = centers - self.origin
        bias = matrix.square().sum(dim=1) * -0.5
        on_cpu = centers.device.type == "cpu"
        self.size = len(centers)
        self._depth = -(-self.size // _LANES) if on_cpu and self.size >= 4 * _LANES else 0
        self._matrix, self._bias = self._interleave(matrix, 0.0), self._interleave(bias, -torch.inf)

    def best(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Largest `closeness` and its index, each [n], for rows [n, D] minus the origin."""
        parts = [self._best(rows[part]) for part in chunks(len(rows), self.size, rows.device)]
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
        """Move centre ``lane * depth + step`` to row ``step * lanes + lane``."""
        if not self._depth:
            return values
        missing = self._depth * _LANES - self.size
        padded = torch.cat([values, values.new_full((missing, *values.shape[1:]), fill)])
        shape = (_LANES, self._depth, *values.shape[1:])
        return padded.view(shape).transpose(0, 1).reshape(padded.shape)


def one_hot_of_largest(scores: Tensor) -> Tensor:
    """1 at the largest entry of each row ``[n, K]`` (the first on ties), else 0.

    If the largest entry is not finite (NaN or infinite features), the row has a NaN instead of the
    1, so that the loss is NaN too.
    """
    value, index = scores.max(dim=-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, index, value * 0 + 1)


def nearest_index(rows: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest centre of each row, [n]; the first on ties."""
    search = Search(centers)
    return torch.cat([search.best(part - search.origin)[1] for part in rows.split(SUMMED)])


def nearest(rows: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance to the nearest centre and its index, each [n]; the first on ties."""
    index = nearest_index(rows, centers)
    # Computed by subtraction, so that a row equal to its centre has distance 0.
    pairs = zip(rows.split(SUMMED), index.split(SUMMED), strict=True)
    return torch.cat([(part - centers[i]).square().sum(dim=1) for part, i in pairs]), index


def sums_by_index(rows: Tensor, index: Tensor, size: int) -> Tensor:
    """Sums of the rows [n, D] of each index, in float64: [size, D]. Deterministic."""
    sums = rows.new_zeros(size, rows.shape[1], dtype=torch.float64)
    if rows.is_cuda:  # index_add_ is nondeterministic there; index_put_ sorts first
        return sums.index_put_((index,), rows.double(), accumulate=True)
    for part, where in zip(rows.split(SUMMED), index.split(SUMMED), strict=True):
        sums += rows.new_zeros(size, rows.shape[1]).index_add_(0, where, part)
    return sums


def _tensor_float() -> bool:
    """Whether CUDA may round the factors of float32 products to 10 bits."""
    if torch.compiler.is_compiling():
        return True  # a graph cannot read the flag; True costs two more small products
    flags = torch.backends.cuda.matmul
    precision = getattr(flags, "fp32_precision", None)  # torch 2.9 and later
    return bool(flags.allow_tf32) if precision is None else precision == "tf32"


def _split_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b.T`` to float32 accuracy from products whose factors are rounded to 10 bits."""
    high_a, high_b = _high_bits(a), _high_bits(b)
    low_a, low_b = a - high_a, b - high_b
    return high_a @ high_b.T + (high_a @ low_b.T + low_a @ high_b.T)


def _high_bits(values: Tensor) -> Tensor:
    """The values truncated to the 10 bits of mantissa that TensorFloat-32 keeps."""
    return (values.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def own_subclass(z: Tensor, labels: Tensor, centers: Tensor, subclasses: int) -> Tensor:
    """Index of the nearest centre of a row's own class: z [n, d], labels [n], centers [K, d].

    -1 if no distance is finite, as for NaN features, and for a negative label. On a GPU the labels
    are not checked, and an index of -1 would mean the last class.
    """
    # Gather the few centres of each row's class; a mask over all K distances would cost more.
    own = centers.reshape(-1, subclasses, centers.shape[1])[labels]
    least, index = (z.unsqueeze(1) - own).square().sum(dim=2).min(dim=1)
    valid = least.isfinite() & (labels >= 0)
    return torch.where(valid, labels * subclasses + index, -1)


def rows_of(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[n]`` of a table ``[K, K]``; index -1 gives a row that begins with NaN."""
    rows = table.index_select(0, index.clamp(min=0))
    rows[:, 0].masked_fill_(index < 0, torch.nan)  # only one entry: a whole row takes longer
    return rows


def mixed_rows(table: Tensor, own: Tensor, shares: Tensor) -> Tensor:
    """Means of the `rows_of` the table for several indices ``[n, m]``, weighted by ``shares``."""
    total = rows_of(table, own[:, 0]).mul_(shares[:, :1])
    for index in range(1, own.shape[1]):
        total.addcmul_(rows_of(table, own[:, index]), shares[:, index : index + 1])
    return total
