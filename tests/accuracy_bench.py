"""Fixtures for the accuracy benchmark: tiny pictures, and the benchmark run on them."""

import gzip
import json

import pytest
import torch

from tests.benchmark_modules import load

TINY_OPTIONS = (
    "--teacher resnet8 --teacher-epochs 1 --validation 20 --images 40 --batch-size 20 --epochs 1 "
    "--width 4 --templates 8 --subclasses 1 --iekd-epochs 1 --warmup 1"
)
TINY = TINY_OPTIONS.split()


def write_idx(path, array, packed=False):
    """An IDX file of bytes."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = bytes([0, 0, 8, array.dim()]) + sizes + array.numpy().tobytes()
    if packed:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


@pytest.fixture(scope="session")
def image_root(tmp_path_factory):
    """A folder with 160 and 40 pictures of ten classes, told apart by a bright row."""
    folder = tmp_path_factory.mktemp("images")
    draw = torch.Generator().manual_seed(0)
    for name, count in (("train", 160), ("t10k", 40)):
        labels = torch.arange(count) % 10
        images = torch.randint(60, (count, 28, 28), generator=draw)
        images[torch.arange(count), 2 * labels + 4] += 150
        write_idx(folder / f"{name}-images-idx3-ubyte", images.byte(), packed=name == "train")
        write_idx(folder / f"{name}-labels-idx1-ubyte", labels.byte())
    return folder


@pytest.fixture
def bench(image_root, tmp_path_factory):
    """Runs the benchmark on the tiny data; shares teachers and restores the thread count."""
    accuracy = load("accuracy")
    cache = tmp_path_factory.getbasetemp() / "teachers"
    threads = torch.get_num_threads()

    def run(out, *options):
        paths = ["--root", str(image_root), "--cache", str(cache), "--out", str(out)]
        accuracy.main([*paths, *TINY, *options])
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    yield run
    torch.set_num_threads(threads)
