"""The overhead of a step: counts match the calls, and both steps compute the same."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from kdlayers.functional import kd
from tests.benchmark_modules import FOLDER, load

CPU = SimpleNamespace(device="cpu")


def test_counts_of_a_known_call():
    logits = torch.randn(2, 3)
    found = load("profile_step").profile(lambda: [kd(logits, logits), kd(logits, logits)])
    assert found.calls["functional/_kd.py", "kd"] == 2
    assert "functional/_kd.py" in found.files
    assert len(found.files) < 5
    assert 2 <= found.functions <= found.calls.total()
    assert found.changes >= 2


def test_a_step_enters_less_than_a_fit():
    found = load("profile_step").measure()
    assert set(found) == {"student(x)", "kd.loss(y)", "kd.fit(loader)"}
    assert ("_layer/layer.py", "KDLayer.forward") not in found["kd.loss(y)"].calls
    assert 0 < found["student(x)"].functions < found["kd.fit(loader)"].functions


@pytest.mark.parametrize("method", ["kd_loss", "letkd"])
def test_both_steps_give_the_same_gradients(method, monkeypatch):
    overhead, seen = load("overhead"), []

    def backward(loss, *modules):
        loss.backward()
        student = modules[0]
        seen.append((loss.detach(), student.first[0].weight.grad.clone()))
        for module in modules:
            module.zero_grad(set_to_none=True)

    monkeypatch.setattr(overhead, "backward", backward)
    steps = getattr(overhead, method)(CPU)
    for name in ("by hand", "kdlayers"):
        steps[name]()
    (loss, gradient), (our_loss, our_gradient) = seen
    torch.testing.assert_close(our_loss, loss)
    torch.testing.assert_close(our_gradient, gradient)


def test_a_clock_of_ones_own():
    ticks = iter(range(1000))
    times = load("_timing").alternate({"a": lambda: None}, 3, least=0.0, clock=lambda: next(ticks))
    assert times == {"a": [1000.0] * 3}


def test_the_table_has_both_methods(tmp_path):
    done = subprocess.run(
        [sys.executable, str(FOLDER / "overhead.py"), "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    for name in ("KDLoss", "letKD-1"):
        assert f"| {name} | by hand |" in done.stdout
    assert (tmp_path / "overhead.json").exists()
