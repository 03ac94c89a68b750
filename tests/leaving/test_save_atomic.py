"""Saving is atomic: the file is always the complete old one or the complete new one."""

import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdlayers import KDPoint, attach_kd, load_student, save_student
from kdlayers._step.sites import slots
from kdlayers._utils.files import replacing
from kdlayers.errors import CheckpointError
from tests.nets import Net, batch

IMAGES, _ = batch()


def student(value=None):
    """A student whose weights are all ``value``."""
    model = Net(4)
    attach_kd(model, at=[KDPoint("last", num_templates=5)], example=IMAGES)
    if value is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(value)
    return model


def value_in(path):
    """The one value of all weights in a file."""
    (value,) = {p for t in load_student(Net(4), path).parameters() for p in t.flatten().tolist()}
    return value


# Saves students of the values given, again and again, as fast as it can.
SAVER = """
import sys
from tests.leaving.test_save_atomic import student
from kdlayers import save_student
students = [student(float(value)) for value in sys.argv[2:]]
save_student(students[0], sys.argv[1])
print("ready", flush=True)
while True:
    for each in students:
        save_student(each, sys.argv[1])
"""


def start(path, *values):
    command = [sys.executable, "-c", SAVER, str(path), *map(str, values)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_file(tmp_path):
    path = tmp_path / "student.pt"
    seen = set()
    # One start of Python takes seconds, so each process is stopped and looked at several times.
    process = start(path, 1, 2)
    try:
        for wait in range(25):
            time.sleep(0.001 * wait)
            os.kill(process.pid, signal.SIGSTOP)
            seen.add(value_in(path))
            os.kill(process.pid, signal.SIGCONT)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert value_in(path) in {1.0, 2.0}
    assert seen <= {1.0, 2.0}
    save_student(student(3.0), path)
    assert value_in(path) == 3.0


@pytest.mark.slow
def test_concurrent_writers_do_not_mix_files(tmp_path):
    path = tmp_path / "student.pt"
    writers = [start(path, 1), start(path, 2)]
    try:
        assert {value_in(path) for _ in range(60)} <= {1.0, 2.0}
    finally:
        for process in writers:
            process.kill()
            process.wait()
            process.stdout.close()


def test_a_full_disk_is_an_error_that_leaves_the_old_file(tmp_path):
    path = tmp_path / "student.pt"
    save_student(student(1.0), path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_student(student(2.0), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert value_in(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]


def test_a_refused_student_leaves_the_old_file(tmp_path):
    path = tmp_path / "student.pt"
    save_student(student(1.0), path)
    changed = student(2.0)
    slots(changed)["last"].alpha = float("nan")
    with pytest.raises(CheckpointError, match="cannot be saved: a KD layer is described by"):
        save_student(changed, path)
    assert value_in(path) == 1.0
    assert list(tmp_path.iterdir()) == [path]


def test_links_modes_and_devices_are_kept(tmp_path):
    path, link = tmp_path / "student.pt", tmp_path / "latest.pt"
    save_student(student(1.0), path)
    path.chmod(0o640)
    link.symlink_to(path.name)
    save_student(student(2.0), link)
    assert link.is_symlink()
    assert value_in(path) == 2.0
    assert path.stat().st_mode & 0o777 == 0o640
    save_student(student(3.0), os.devnull)
    assert not Path(os.devnull).is_file()


def test_a_new_file_has_the_default_mode(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    with replacing(tmp_path / "new") as file:
        file.write(b"whole")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "new").read_bytes() == b"whole"
    long = tmp_path / ("n" * 255)  # the longest name there can be
    with replacing(long) as file:
        file.write(b"whole")
    assert long.read_bytes() == b"whole"


def test_file_objects_are_written_and_read():
    file = io.BytesIO()
    save_student(student(4.0), file)
    assert value_in(file) == 4.0


def test_checksums_are_written_whatever_the_setting(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_student(student(1.0), tmp_path / "student.pt")
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    assert value_in(tmp_path / "student.pt") == 1.0
