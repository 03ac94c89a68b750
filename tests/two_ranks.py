"""Two processes on one machine, each a rank of one Gloo process group."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

STORE = "KDLAYERS_TEST_STORE"


def on_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, *args)`` in two new processes; an error in one is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (function, f"file://{folder}/store", args), nprocs=2)


def connect(rank: int) -> None:
    """Start the process group, from inside ``function``; it is destroyed at the end."""
    dist.init_process_group("gloo", init_method=os.environ[STORE], rank=rank, world_size=2)


def _rank(rank: int, function: Callable[..., None], store: str, args: tuple[Any, ...]) -> None:
    os.environ[STORE] = store
    torch.set_num_threads(1)
    function(rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()
    # Gloo's threads may still release tensors that belong to Python. If the interpreter ends at
    # that moment, torch aborts the process (pytorch issue 190489), so it must not end by itself.
    os._exit(0)
