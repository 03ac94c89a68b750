"""The files of a record: written whole, resumed after a kill, refused when damaged."""

import json
import random
import shutil

import pytest
import torch

from kdlayers._records import write as write_module
from kdlayers._records.dataset import from_reader, rows_of, transform_of
from kdlayers._records.files import DESCRIPTION, Description, Field, Reader
from kdlayers._records.write import write_record
from kdlayers.errors import RecordError
from tests.records.data import FlipAndCrop, Squares


def plan_for(dataset, **changes):
    settings = {
        "samples": len(dataset),
        "views": 3,
        "seed": 5,
        "batch_size": 7,
        "fields": (Field("logits", (4,), "float32"), Field("layer", (2, 3), "float16")),
        "about": {"transform": transform_of(dataset)},
    }
    return Description(**(settings | changes))


def run(images):
    """Two tensors that depend on every pixel of an image, and on no other image."""
    weights = torch.linspace(-1, 1, images[0].numel()).reshape(images[0].shape)
    total = (images * weights).sum((1, 2, 3))
    return total[:, None] * torch.arange(1.0, 5), images[:, 0, :2, :3]


def write(path, dataset=None, plan=None, run=run):
    dataset = dataset or Squares(transform=FlipAndCrop())
    plan = plan or plan_for(dataset)
    write_record(dataset, path, plan, run, num_workers=0, progress=False)
    return dataset


def contents(path):
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def test_every_row_is_what_was_said_of_the_very_image(tmp_path):
    dataset = write(tmp_path / "record")
    recorded = from_reader(Reader(tmp_path / "record"), dataset)
    seen = set()
    for epoch in range(3):
        recorded.set_epoch(epoch)
        for index in range(len(dataset)):
            image, label, key = recorded[index]
            reader, rows = rows_of(key[None])
            logits, layer = run(image[None])
            assert torch.equal(reader.read(rows)["logits"], logits)
            assert torch.equal(reader.read(rows)["layer"], layer.half())
            assert label == index % 4
            seen.add((index, rows[0]))
    assert len(seen) == 3 * len(dataset)  # three epochs show every view once


def test_written_twice_it_is_the_same_to_the_byte(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(seed, tmp_path):
    write(tmp_path / "whole")
    rng = random.Random(seed)
    last = rng.randrange(10)
    calls = 0

    def killed(images):
        nonlocal calls
        calls += 1
        if calls > last:
            raise KeyboardInterrupt
        return run(images)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "resumed", run=killed)
    calls = 0

    def counted(images):
        nonlocal calls
        calls += 1
        return run(images)

    write(tmp_path / "resumed", run=counted)
    assert contents(tmp_path / "whole") == contents(tmp_path / "resumed")
    assert calls == 11 - last  # 72 rows in batches of 7; finished batches are not run again


@pytest.mark.parametrize("left", ["the plan alone", "the plan of a finished record"])
def test_a_kill_before_the_first_row_or_after_the_last_is_gone_on_from(left, whole, tmp_path):
    path = tmp_path / "record"
    if left == "the plan alone":
        path.mkdir()
    else:
        shutil.copytree(whole, path)
    dataset = Squares(transform=FlipAndCrop())
    (path / write_module.PLAN).write_text(plan_for(dataset).to_json())
    (path / ".kdlayers-0123.tmp").write_bytes(b"half")
    write(path, dataset)
    (path / ".kdlayers-0123.tmp").unlink()
    assert contents(path) == contents(whole)


def test_an_unfinished_record_is_refused(tmp_path):
    def stopped(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "record", run=stopped)
    with pytest.raises(RecordError, match="no finished record"):
        Reader(tmp_path / "record")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "whole"
    write(path)
    return path


@pytest.mark.parametrize("seed", range(100))
def test_one_changed_bit_never_gives_a_number(seed, whole, tmp_path):
    dataset = Squares(transform=FlipAndCrop())
    shutil.copytree(whole, tmp_path / "record")
    rng = random.Random(seed)
    file = rng.choice(sorted((tmp_path / "record").iterdir()))
    data = bytearray(file.read_bytes())
    if seed % 4 == 0:
        data = data[: rng.randrange(len(data))]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)

    def use():
        reader = Reader(tmp_path / "record")
        reader.read(range(reader.description.rows))
        from_reader(reader, dataset)

    with pytest.raises(RecordError):
        use()


@pytest.mark.parametrize(
    ("changes", "name"),
    [({"seed": 6}, "seed"), ({"views": 2}, "views"), ({"batch_size": 8}, "batch_size")],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_with_other_settings_is_refused(changes, name, finished, tmp_path):
    def stopped(_):
        raise KeyboardInterrupt

    dataset = Squares(transform=FlipAndCrop())
    if finished:
        write(tmp_path / "record", dataset)
    else:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "record", dataset, run=stopped)
    with pytest.raises(RecordError, match=f"{name} is"):
        write(tmp_path / "record", dataset, plan_for(dataset, **changes))


def test_a_full_folder_and_a_full_disk_are_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match="not empty"):
        write(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(write_module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(RecordError, match=r"2\.59 kB, but the disk .* 100 bytes free"):
        write(tmp_path / "record")


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    dataset = Squares(transform=FlipAndCrop())
    plan = plan_for(dataset, fields=(Field("logits", (4,), "float16"),))
    with pytest.raises(RecordError, match="dtype='float32'"):
        write(tmp_path / "a", dataset, plan, lambda x: [run(x)[0] + 1e6])
    with pytest.raises(RecordError, match="NaN or infinity"):
        write(tmp_path / "b", dataset, plan, lambda x: [run(x)[0] * float("nan")])


def test_a_newer_version_says_so(tmp_path):
    write(tmp_path / "record")
    file = tmp_path / "record" / DESCRIPTION
    body = json.loads(file.read_text())
    file.write_text(json.dumps(body | {"version": 99}))
    with pytest.raises(RecordError, match="version 99"):
        Reader(tmp_path / "record")
