"""What every test gets: one thread, a fixed seed, and no debris in the global random state."""

import os

# Waiting threads that spin slow a machine with few cores down; read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from tests.accuracy_bench import bench, image_root

__all__ = ["bench", "image_root"]  # fixtures of several files


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads():
    torch.set_num_threads(1)
