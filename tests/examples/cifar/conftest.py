"""Pictures of a hundred classes, a teacher of them, its record, and the benchmark run on them."""

import json

import pytest
import torch
from PIL import Image

from tests.benchmark_modules import load
from tests.examples.cifar import OPTIONS


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """Class folders with four and two pictures of a hundred classes, each of its own colour."""
    folder = tmp_path_factory.mktemp("cifar100")
    draw = torch.Generator().manual_seed(0)
    colours = torch.randint(30, 225, (100, 3), generator=draw)
    for part, count in (("train", 4), ("test", 2)):
        for label in range(100):
            place = folder / part / f"class{label:03}"
            place.mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(-30, 30, (32, 32, 3), generator=draw)
                pixels = (colours[label] + noise).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(place / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A teacher's weights under the names of the usual collections."""
    torch.manual_seed(1)
    model = load("models.cifar_resnet").make("resnet8", num_classes=100)
    state = {
        f"module.{k.replace('shortcut', 'downsample')}": v for k, v in model.state_dict().items()
    }
    path = tmp_path_factory.mktemp("teacher") / "resnet8.pth"
    torch.save({"model": state}, path)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(root, checkpoint, cache):
    """Runs the benchmark; shares data, teacher and record, and restores the number of threads."""
    threads = torch.get_num_threads()

    def run(out, *options):
        paths = ["--root", str(root), "--cache", str(cache), "--out", str(out)]
        load("accuracy").main([*OPTIONS, *paths, "--teacher-checkpoint", str(checkpoint), *options])
        return [json.loads(line) for line in out.read_text("utf-8").splitlines()]

    yield run
    torch.set_num_threads(threads)


@pytest.fixture
def record(root, checkpoint, cache):
    """The teacher, and its record of two views of 120 images."""
    data, records, teachers = (load(f"_accuracy_{name}") for name in ("data", "record", "teacher"))
    splits = data.load("cifar100", str(root), cache, validation=100)
    teacher, facts = teachers.given_teacher(checkpoint, "resnet8", splits, cache, None)
    split = data.few(splits.train, 120, 0)
    points = ["layer1", "layer3.0", "last"]
    made = records.recorded(teacher, "hash", split, points, cache, views=2, padding=4)
    return teacher, made
