"""The framework examples run, resume, and never save the teacher."""

import importlib.util
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from kdlayers import KDLayer
from tests.examples import EXAMPLES

pytest.importorskip("mlxtend")


def run(script, out, *options, launcher=()):
    """The output of an example with ``--quick``."""
    command = [sys.executable, *launcher, str(EXAMPLES / f"{script}.py"), "--quick"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--out", str(out), *map(str, options)],
        capture_output=True,
        text=True,
        cwd=out,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def needs(package):
    """Skips a test where ``package`` is missing; importing it would take seconds."""
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


def port():
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def load(file):
    return torch.load(file, map_location="cpu", weights_only=True)


def weights(out):
    """What ``save_student`` wrote of the student's state."""
    return load(out / "student.pt")["state"]


def random_tensors(state):
    """Bytes of the tensors that no other model can have by chance."""
    found = {k: v for k, v in state.items() if v.is_floating_point() and v.numel() >= 64}
    return {k: v.numpy().tobytes() for k, v in found.items() if v.unique().numel() >= 64}


def check_files(out, *files):
    """The files hold the student, and none under ``out`` holds anything of the teacher."""
    teacher = random_tensors(load(out / "teacher.pt"))
    student = random_tensors(weights(out))
    assert len(teacher) > 20
    assert len(student) > 10
    everything = {f: f.read_bytes() for f in out.rglob("*") if f.is_file()}
    del everything[out / "teacher.pt"]
    for file in files:
        missing = [name for name, data in student.items() if data not in everything[out / file]]
        assert missing == [], file
    for file, content in everything.items():
        assert [name for name, data in teacher.items() if data in content] == [], file
        assert b"teacher." not in content, file
        # The student, two buffers of an optimiser, and targets; a teacher would not fit in.
        assert len(content) < 3.5 * (out / "student.pt").stat().st_size, file


def check_moved(out, kd_state):
    """Training changes all parameters of the KD layers and of the loss."""
    state, fresh = weights(out), KDLayer(4, 4)
    for end in ("head.scale", "norm.weight", "norm.bias", "value.scale"):
        initial = fresh.get_parameter(end).detach().flatten()[0]
        found = [v for k, v in state.items() if k.endswith(f".kd.{end}")]
        assert len(found) == 2, end
        assert all((value != initial).all() for value in found), end
    fc = kd_state["losses"]["AEKTLoss"]["fc.weight"]
    assert not torch.equal(fc, torch.eye(10))


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port()}")
    output = run("ddp", tmp_path, launcher=launcher)
    assert re.findall(r"^epoch (\d): loss \d+\.\d+$", output, re.M) == ["0", "1"]
    saved = load(tmp_path / "checkpoint.pt")
    assert saved["kd"]["step"] == 8
    assert not any(key.startswith("module.") for key in saved["student"])
    check_files(tmp_path, "student.pt", "checkpoint.pt")
    check_moved(tmp_path, saved["kd"])


@needs("lightning")
def test_lightning_goes_on_where_it_stopped(tmp_path):
    run("frameworks/lightning_module", tmp_path, "--epochs", 1)
    before = load(tmp_path / "last.ckpt")
    options = ("--epochs", 2, "--resume", tmp_path / "last.ckpt")
    run("frameworks/lightning_module", tmp_path, *options)
    after = load(tmp_path / "last.ckpt")
    assert before["kd"]["step"] == before["global_step"] == 8
    assert after["kd"]["step"] == after["global_step"] == 16
    check_targets(before["kd"], after["kd"])
    assert all(key.startswith("student.") for key in after["state_dict"])
    check_files(tmp_path, "last.ckpt", "student.pt")
    check_moved(tmp_path, after["kd"])


@needs("accelerate")
def test_accelerate_goes_on_where_it_stopped(tmp_path):
    first = run("frameworks/accelerate_loop", tmp_path, "--epochs", 1)
    before = load(tmp_path / "state" / "custom_checkpoint_0.pkl")
    second = run(
        "frameworks/accelerate_loop", tmp_path, "--epochs", 1, "--resume", tmp_path / "state"
    )
    after = load(tmp_path / "state" / "custom_checkpoint_0.pkl")
    assert (before["step"], after["step"]) == (8, 16)
    assert "epoch 0, step 8: loss" in first
    assert "epoch 0, step 16: loss" in second
    check_targets(before, after)
    check_files(tmp_path, "state/model.safetensors", "student.pt")
    check_moved(tmp_path, after)


@needs("transformers")
@needs("accelerate")
def test_trainer_goes_on_where_it_stopped(tmp_path):
    run("frameworks/hf_trainer", tmp_path)
    before, whole = (load(tmp_path / f"checkpoint-{step}" / "kd.pt") for step in (8, 16))
    run("frameworks/hf_trainer", tmp_path, "--resume", tmp_path / "checkpoint-8")
    after = load(tmp_path / "checkpoint-16" / "kd.pt")
    assert whole["step"] == after["step"] == 16
    assert before["step"] == 8
    check_targets(before, after)
    check_files(tmp_path, "checkpoint-16/model.safetensors", "student.pt")
    check_moved(tmp_path, after)


def check_targets(before, after):
    """The fitted targets are unchanged; the parameters of the loss are trained."""
    for name, state in before["losses"].items():
        for key, value in state.items():
            assert torch.equal(value, after["losses"][name][key]) != (name == "AEKTLoss"), key
