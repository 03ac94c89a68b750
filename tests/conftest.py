"""Every test runs with one thread and a fixed seed, and must not change the global random state."""

import os
from pathlib import Path

# Waiting threads that spin slow a machine with few cores down; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import settings

from tests.accuracy_bench import bench, image_root

# The first example of a test may compile or import; a busy machine takes longer for any.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

__all__ = ["bench", "image_root"]  # fixtures of several files

TESTS = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests of examples, recipes and benchmarks, which plain pytest leaves out."""
    for item in items:
        if TESTS / "examples" in item.path.parents:
            item.add_marker(pytest.mark.benchmark)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)
