"""A call that was killed at any moment goes on to the bytes of an undisturbed one."""

import os
import random
import shutil
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import pytest

import kdlayers
from kdlayers._records.files import Reader
from kdlayers._records.folder import PLAN
from kdlayers.errors import RecordError
from tests.records.data import FlipAndCrop, Squares
from tests.records.test_files import contents, plan_for, run, write

pytestmark = pytest.mark.slow

ROOT = Path(kdlayers.__file__).parent
WRITING = [str(ROOT / "_records" / n) for n in ("write.py", "folder.py", "files.py", "views.py")]
REPLACING = [str(ROOT / "_utils" / "files.py")]


def lines(files, done):
    """Calls ``done`` before each line of these files that Python executes."""

    def trace(frame, event, _):
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            done()
        return trace

    return trace


def count_lines(path, files):
    """How many lines of these files an undisturbed recording executes."""
    count = 0

    def one():
        nonlocal count
        count += 1

    before = sys.gettrace()
    sys.settrace(lines(files, one))
    try:
        write(path)
    finally:
        sys.settrace(before)
    return count


def killed_at(path, files, moment):
    """Record in a process that kills itself before the line of this number; whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork where there are threads
        child = os.fork()
    if child == 0:
        left = moment

        def one():
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.settrace(lines(files, one))
        with suppress(BaseException):
            write(path)
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "whole"
    write(path)
    return path


forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")


def finish(path, whole):
    """An unfinished record gives no number; the next call makes it whole."""
    if not (path / "record.json").exists():
        with pytest.raises(RecordError, match="no finished record"):
            Reader(path)
    write(path)
    for file in path.glob(".kdlayers-*"):  # a killed process leaves its temporary file
        file.unlink()
    assert contents(path) == contents(whole)


@forks
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_random_moment_it_goes_on_to_the_same_bytes(seed, whole, tmp_path):
    total = count_lines(tmp_path / "counted", WRITING + REPLACING)
    moment = random.Random(seed).randrange(total)
    assert killed_at(tmp_path / "record", WRITING + REPLACING, moment)
    finish(tmp_path / "record", whole)


@forks
def test_killed_ten_times_it_goes_on_to_the_same_bytes(whole, tmp_path):
    total = count_lines(tmp_path / "counted", WRITING + REPLACING)
    rng = random.Random(0)
    kills = sum(
        killed_at(tmp_path / "record", WRITING + REPLACING, rng.randrange(total // 4))
        for _ in range(10)
    )
    assert kills >= 5
    finish(tmp_path / "record", whole)


@forks
def test_killed_while_a_file_is_renamed_it_goes_on_to_the_same_bytes(whole, tmp_path):
    total = count_lines(tmp_path / "counted", REPLACING)
    assert total > 20  # the plan and the description are written in one step each
    for moment in range(total):
        assert killed_at(tmp_path / f"{moment}", REPLACING, moment)
        finish(tmp_path / f"{moment}", whole)


@pytest.mark.parametrize("seed", range(10))
def test_finished_batches_are_not_run_again(seed, tmp_path):
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
def test_what_a_kill_may_leave_is_gone_on_from(left, whole, tmp_path):
    path = tmp_path / "record"
    if left == "the plan alone":
        path.mkdir()
    else:
        shutil.copytree(whole, path)
    dataset = Squares(transform=FlipAndCrop())
    (path / PLAN).write_text(plan_for(dataset).to_json())
    (path / ".kdlayers-0123.tmp").write_bytes(b"half")
    write(path, dataset)
    (path / ".kdlayers-0123.tmp").unlink()
    assert contents(path) == contents(whole)
