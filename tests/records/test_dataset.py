# ruff: noqa: NPY002 - transforms of users draw from NumPy's global generator
"""Views are the same in every process, and a changed data set is noticed."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2

from kdlayers import KDLoss, attach_kd
from kdlayers._records.dataset import from_reader, open_record, rows_of
from kdlayers._records.files import Reader
from kdlayers._records.views import seeded, view_at
from kdlayers.errors import ArgumentError, RecordError
from tests.records.data import FlipAndCrop, Squares
from tests.records.test_files import run, write


def test_a_mirrored_view_is_never_paired_with_another_row(tmp_path):
    dataset = write(tmp_path / "record")
    recorded = from_reader(Reader(tmp_path / "record"), dataset)
    for epoch in range(3):
        recorded.set_epoch(epoch)
        for index in range(len(dataset)):
            image, _, key = recorded[index]
            reader, rows = rows_of(key[None])
            said = reader.read(rows)["logits"]
            assert torch.equal(said, run(image[None])[0])
            assert not torch.equal(said, run(image.flip(-1)[None])[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_the_same_views_and_follow_the_epoch(workers, tmp_path):
    dataset = write(tmp_path / "record")
    recorded = from_reader(Reader(tmp_path / "record"), dataset)
    loader = DataLoader(recorded, batch_size=5, num_workers=workers, persistent_workers=True)
    for epoch in range(2):
        recorded.set_epoch(epoch)
        here = [recorded[i] for i in range(len(dataset))]
        images, labels, keys = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, torch.stack([image for image, _, _ in here]))
        assert labels.tolist() == [label for _, label, _ in here]
        assert torch.equal(keys, torch.stack([key for _, _, key in here]))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_reads_the_record_and_its_workers_follow_its_epoch(copied, tmp_path):
    dataset = write(tmp_path / "record")
    recorded = from_reader(Reader(tmp_path / "record"), dataset)
    recorded.set_epoch(1)
    other = copied(recorded)
    loader = DataLoader(other, batch_size=24, num_workers=1, persistent_workers=True)
    for epoch in (1, 2):
        other.set_epoch(epoch)
        (_, _, keys) = next(iter(loader))
        assert torch.equal(keys, torch.stack([other[i][2] for i in range(24)]))
    assert torch.equal(other[0][2], recorded[0][2]) == (copied is copy.copy)
    other.check_inputs = False
    assert other.reader is recorded.reader


def test_drawing_leaves_the_users_random_states_alone():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with seeded(3):
        random.random(), np.random.rand(), torch.rand(2)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])


def test_all_views_of_a_sample_come_round():
    for sample in range(20):
        assert sorted(view_at(sample, epoch, 5) for epoch in range(3, 8)) == list(range(5))
    assert len({view_at(sample, 0, 5) for sample in range(20)}) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: Squares(23, transform=FlipAndCrop()), "24 samples, but the data set has 23"),
        (lambda: Squares(transform=v2.RandomCrop(8)), "made with the transform"),
    ],
)
def test_another_data_set_is_refused(change, message, tmp_path):
    write(tmp_path / "record")
    with pytest.raises(RecordError, match=message):
        open_record(tmp_path / "record", change())


def test_changed_images_are_refused_when_opened_and_when_drawn(tmp_path):
    dataset = write(tmp_path / "record")
    recorded = from_reader(Reader(tmp_path / "record"), dataset)
    dataset.images[3, 0, 4, 4] += 1e-3
    with pytest.raises(RecordError, match="sample 3 is not the image that the teacher saw"):
        recorded[3]
    dataset.images[0] += 1e-3
    with pytest.raises(RecordError, match="sample 0"):
        open_record(tmp_path / "record", dataset)


def test_keys_are_checked(tmp_path):
    dataset = write(tmp_path / "record")
    recorded = from_reader(Reader(tmp_path / "record"), dataset)
    key = recorded[0][2][None]
    for wrong, message in [
        (3, "got int"),
        (key[0], "int64"),
        (torch.tensor([[7, 0]]), "not those of an open record"),
        (torch.cat([key, torch.tensor([[7, 0]])]), "2 records"),
        (key + torch.tensor([0, 10**6]), "a view that the record does not have"),
    ]:
        with pytest.raises(RecordError, match=message):
            rows_of(wrong)


@pytest.mark.parametrize("epoch", [-1, 1.5, True])
def test_epochs_are_checked(epoch, tmp_path):
    dataset = write(tmp_path / "record")
    with pytest.raises(ArgumentError, match="set_epoch"):
        from_reader(Reader(tmp_path / "record"), dataset).set_epoch(epoch)


class Stream(IterableDataset):
    """A stream that knows its length."""

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([(torch.rand(3, 12, 12), 0)] * 4)


def test_a_stream_is_refused_even_with_a_length(tmp_path):
    kd = attach_kd(nn.Flatten(), nn.Flatten(), losses=[KDLoss()], example=torch.rand(2, 3, 12, 12))
    with pytest.raises(ArgumentError, match="no samples by index"):
        kd.record(Stream(), tmp_path / "record", progress=False)
