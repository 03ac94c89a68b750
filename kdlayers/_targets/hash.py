"""Random keys that depend on a counter alone, and tags that depend on a row's content alone.

A generator's stream would tie a row's random number to how the data were cut into batches, and to
the device. A mixed counter gives the same number anywhere: splitmix64 (Steele, Lea and Flood, "Fast
Splittable Pseudorandom Number Generators", OOPSLA 2014), in int64 arithmetic that wraps round.
"""

import torch
from torch import Tensor

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def mix(values: Tensor) -> Tensor:
    """A fixed bijection of int64 that looks random."""
    for shift, factor in _FACTORS:
        values = (values ^ _shift_right(values, shift)) * _signed(factor)
    return values ^ _shift_right(values, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Shift that fills with zeros; int64's own fills with the sign."""
    return torch.bitwise_and(values >> bits, 2 ** (64 - bits) - 1)


def derive_seed(*parts: int) -> int:
    """One seed in 0..2^63-1 out of several numbers, such as the user's seed and a rank."""
    state = 0
    for part in parts:
        state = (state + part + _GOLDEN) & _MASK
        for shift, factor in _FACTORS:
            state = ((state ^ (state >> shift)) * factor) & _MASK
        state ^= state >> 31
    return state >> 1


def counter_keys(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Random numbers in 0..2^63-1 for the counters ``first`` to ``first + count - 1``: [count]."""
    counters = torch.arange(first, first + count, device=device)
    return mix(counters * _signed(_GOLDEN) + seed) & (2**63 - 1)


def row_tags(rows: Tensor) -> Tensor:
    """A number for each row [N, D] that depends on its values only: [N], equal for equal rows.

    Sorting by tags gives rows an order that does not depend on who read them, or when.
    """
    bits = (rows + 0.0).contiguous()  # -0.0 becomes 0.0
    integers = bits.view(torch.int64 if rows.dtype == torch.float64 else torch.int32).long()
    factors = mix(torch.arange(1, rows.shape[1] + 1, device=rows.device)) | 1
    return mix((mix(integers) * factors).sum(dim=1))
