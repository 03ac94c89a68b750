"""Random keys that depend only on a counter, and tags that depend only on a row's values.

Random numbers from a generator would depend on the batch size and the device. A hashed counter
gives the same numbers everywhere: splitmix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom
Number Generators", OOPSLA 2014), in int64 arithmetic with overflow.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def mix(values: Tensor) -> Tensor:
    """A fixed pseudorandom bijection of int64."""
    for shift, factor in _FACTORS:
        values = (values ^ _shift_right(values, shift)) * _signed(factor)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical right shift; the shift of int64 is arithmetic."""
    return torch.bitwise_and(values >> bits, 2 ** (64 - bits) - 1)


def derive_seed(*parts: int) -> int:
    """One seed in 0..2^63-1 from several numbers, such as the user's seed and a rank."""
    state = torch.zeros((), dtype=torch.int64, device="cpu")
    for part in parts:
        state = mix(state + _signed((part + _GOLDEN) % 2**64))
    return (int(state) % 2**64) >> 1


def counter_keys(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Random numbers in 0..2^63-1 for the counters ``first`` to ``first + count - 1``: [count]."""
    counters = torch.arange(first, first + count, device=device)
    return mix(counters * _signed(_GOLDEN) + seed) & (2**63 - 1)


def row_tags(rows: Tensor) -> Tensor:
    """A hash [N] of the values of each row [N, D]; equal rows have equal hashes.

    The order by hashes does not depend on when a row was read, or on which rank.
    """
    bits = (rows + 0.0).contiguous()  # -0.0 becomes 0.0
    integers = bits.view(torch.int64 if rows.dtype == torch.float64 else torch.int32).long()
    factors = mix(torch.arange(1, rows.shape[1] + 1, device=rows.device)) | 1
    return mix((mix(integers) * factors).sum(dim=1))
