"""Views: the samples of a data set under seeded augmentation, the same each time they are drawn."""

import random
import sys
import zlib
from collections.abc import Generator, Sized
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any, cast

import torch
from torch import Tensor

from kdlayers._records.generators import own_generators
from kdlayers.errors import RecordError


def view_seed(seed: int, sample: int, view: int) -> int:
    """The 64-bit seed of a view, from the record's seed, the sample's index and the view's."""
    text = f"{seed} {sample} {view}".encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


@contextmanager
def seeded(value: int) -> Generator[None, None, None]:
    """Context in which Python's, NumPy's and torch's generators are seeded."""
    numpy = sys.modules.get("numpy")
    python = random.getstate()
    state = torch.get_rng_state()
    arrays = None if numpy is None else numpy.random.get_state()
    random.seed(value)
    torch.default_generator.manual_seed(value)
    if numpy is not None:
        numpy.random.seed(value & 0xFFFFFFFF)
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(state)
        if numpy is not None:
            numpy.random.set_state(arrays)


def draw(dataset: Any, seed: int, sample: int, view: int) -> tuple[Any, ...]:
    """View ``view`` of a sample: the image, a tensor, and the data set's other values.

    Raises:
        RecordError: if the sample is not a tuple that begins with an image tensor.
    """
    value = view_seed(seed, sample, view)
    with seeded(value), own_generators(dataset, value):
        found = dataset[sample]
    items = tuple(found) if isinstance(found, (tuple, list)) else (found,)
    if not items or not isinstance(items[0], Tensor):
        kind = type(items[0]).__name__ if items else "an empty tuple"
        raise RecordError(
            f"sample {sample} of the data set gives {kind} where a record needs an image tensor; "
            "the data set must return (image, label), with a transform that ends in a tensor"
        )
    return items


def image_check(image: Tensor) -> int:
    """CRC-32 of the image's values and shape, as a signed 32-bit number."""
    start = zlib.crc32(f"{image.dtype} {tuple(image.shape)}".encode())
    data = image.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return signed(zlib.crc32(data.numpy().data, start))


def signed(number: int) -> int:
    """An unsigned 32-bit number as a signed one of the same bits."""
    return number - 2**32 if number >= 2**31 else number


def view_at(sample: int, epoch: int, views: int) -> int:
    """The view that a sample shows in an epoch; ``views`` epochs show each of them once."""
    return (epoch + view_seed(0, sample, 0)) % views


def check_repeatable(dataset: Any, seed: int, views: int) -> bool:
    """Draw a few samples twice; returns whether any sample's views differ from each other.

    Raises:
        RecordError: if a view is not the same the second time.
    """
    count = len(cast(Sized, dataset))
    varied = False
    for sample in sorted({i * (count - 1) // 7 for i in range(8)}):
        first = [image_check(draw(dataset, seed, sample, v)[0]) for v in range(min(views, 2))]
        again = [image_check(draw(dataset, seed, sample, v)[0]) for v in range(min(views, 2))]
        if first != again:
            raise RecordError(
                f"sample {sample} of the data set differs when it is drawn again from one seed: a "
                "transform has its own random generator, which a record cannot seed. Use "
                "transforms that draw from Python's `random`, from NumPy's global generator or "
                "from torch's default generator, or seed its generator in the data set's "
                "__getitem__, for example from random.getrandbits(32)"
            )
        varied = varied or len(set(first)) > 1
    return varied
