"""The files of a record: written whole, resumed after a kill, refused when damaged."""

import json
import random
import shutil

import pytest
import torch

from kdlayers._records import folder as folder_module
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


def write(path, dataset=None, plan=None, run=run, progress=False):
    dataset = dataset or Squares(transform=FlipAndCrop())
    plan = plan or plan_for(dataset)
    write_record(dataset, path, plan, run, num_workers=0, progress=progress)
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


FILES = ("checks.bin", "field0.bin", "field1.bin", "record.json")


def damages(data, rng):
    """Many ways in which a file can be damaged; None stands for a file that is gone."""
    for _ in range(25):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        yield bytes(changed)
    yield from (data[: rng.randrange(1, len(data))], b"", data[:-1], data + b"\0", bytes(len(data)))
    yield None


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_never_gives_a_number(name, whole, tmp_path):
    dataset = Squares(transform=FlipAndCrop())
    assert tuple(sorted(file.name for file in whole.iterdir())) == FILES
    shutil.copytree(whole, tmp_path / "record")
    file = tmp_path / "record" / name

    def use():
        reader = Reader(tmp_path / "record")
        reader.read(range(reader.description.rows))
        from_reader(reader, dataset)

    use()
    for data in damages(file.read_bytes(), random.Random(name)):
        file.unlink(missing_ok=True)
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(RecordError):
            use()


def test_two_rows_that_change_places_are_noticed(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "record")
    rows = bytearray((whole / "field0.bin").read_bytes())
    rows[:16], rows[16:32] = rows[16:32], rows[:16]
    (tmp_path / "record" / "field0.bin").write_bytes(rows)
    with pytest.raises(RecordError, match="view 0 of sample 0 was changed"):
        Reader(tmp_path / "record").read([0, 1])


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


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecordError, match="not empty"):
        write(tmp_path)


def fake_free_space(monkeypatch, free):
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda _: usage)


def test_too_little_disk_is_refused_before_the_first_forward(tmp_path, monkeypatch):
    fake_free_space(monkeypatch, 100)
    forwards = []
    with pytest.raises(RecordError, match=r"2\.59 kB, but the disk .* 100 bytes free"):
        write(tmp_path / "record", run=forwards.append)
    assert forwards == []
    assert list((tmp_path / "record").iterdir()) == []


def test_a_stopped_record_needs_room_for_the_rest_only(tmp_path, monkeypatch, capsys):
    calls = []

    def stopped(images):
        calls.append(1)
        if len(calls) == 10:  # 63 of 72 rows are written; 9 rows of 36 bytes are left
            raise KeyboardInterrupt
        return run(images)

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "record", run=stopped)
    fake_free_space(monkeypatch, 323)
    with pytest.raises(RecordError, match="324 bytes, but the disk"):
        write(tmp_path / "record")
    fake_free_space(monkeypatch, 324)
    capsys.readouterr()
    write(tmp_path / "record", progress=True)
    assert "2.59 kB (324 bytes still to write), 324 bytes free" in capsys.readouterr().err


def test_size_and_free_space_are_said_before_the_teacher_runs(tmp_path, monkeypatch, capsys):
    fake_free_space(monkeypatch, 12_345_678)

    def unwilling(_):
        raise KeyboardInterrupt

    for progress in (True, False):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / f"{progress}", run=unwilling, progress=progress)
        said = capsys.readouterr()
        line = f"recording 3 views of 24 samples in {tmp_path / 'True'}: 2.59 kB, 12.3 MB free\n"
        assert (said.out, said.err) == ("", line if progress else "")


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
