"""The training loop of the recipes and benchmarks, with a checkpoint after every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from common.files import save
from kdlayers import KDHandle

Batches = Iterable[tuple[Tensor, Tensor]]
Recipe = dict[str, Any]
Terms = dict[str, Tensor]
MEASURED = {"teacher.accuracy"}
"""Entries of a recipe that may differ a little between devices; ``teacher.weights`` does not."""


def optimise(
    batches: Iterable[Any],
    loss: Callable[[Any], tuple[Tensor, Terms]],
    optimizer: Optimizer,
    schedule: LRScheduler,
) -> dict[str, float]:
    """Make a step for each batch; returns the mean of every term, with five digits.

    Args:
        batches: the batches.
        loss: maps a batch to the loss and to its terms by name.
        optimizer: the optimiser.
        schedule: changes the learning rate after every step.
    """
    sums: Terms = {}
    steps = 0
    for batch in batches:
        value, terms = loss(batch)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        steps += 1
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term
    return {name: float(f"{float(value) / steps:.5g}") for name, value in sums.items()}


class Training:
    """The training of a model with SGD, from the first epoch or from a checkpoint.

    The loss is the cross-entropy times ``ce_weight``, plus ``kd.loss``.

    Args:
        model: the network, with its KD layers attached.
        kd: its handle; ``None`` trains with labels only.
        recipe: all settings that affect the result, as JSON values: ``epochs``, ``lr``,
            ``weight_decay``, and any others. A checkpoint of another recipe is refused.
        schedule: makes the schedule of the learning rate, which is called after every step.
        checkpoint: file written after `fit` and after every epoch; if it exists, training resumes
            from it; ``None``: no file is written.
        ce_weight: weight of the cross-entropy.
        bfloat16: whether to autocast to bfloat16, which needs no loss scaling.
        forward: the callable to run on images, such as a wrapper of the model or a compiled one;
            default: the model.
        compiled: whether to compile ``kd.loss``.

    Attributes:
        curve: the mean of every term of the loss, for each epoch.
        seconds: the time of each epoch, as of `seconds`.
        fit_seconds: the time of `fit`.
    """

    def __init__(
        self,
        model: nn.Module,
        kd: KDHandle | None,
        recipe: Recipe,
        schedule: Callable[[Optimizer], LRScheduler],
        checkpoint: Path | None = None,
        *,
        ce_weight: float = 1.0,
        bfloat16: bool = False,
        forward: Callable[[Tensor], Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.kd, self.recipe, self.checkpoint = model, kd, recipe, checkpoint
        self.ce_weight, self.bfloat16 = ce_weight, bfloat16
        self.forward = model if forward is None else forward
        self.distil = None if kd is None else torch.compile(kd.loss) if compiled else kd.loss
        self.device = device_of(model)
        own = [] if kd is None else list(kd.parameters())
        self.optimizer = SGD(
            [*model.parameters(), *own],
            recipe["lr"],
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe["weight_decay"],
        )
        self.schedule = schedule(self.optimizer)
        self.curve: list[dict[str, float]] = []
        self.seconds: list[float] = []
        self.fit_seconds = 0.0
        self.resumed = checkpoint is not None and checkpoint.exists()
        if self.resumed:
            self._resume()

    @property
    def epoch(self) -> int:
        """Number of finished epochs."""
        return len(self.curve)

    def fit(self, batches: Batches, seed: int, *, progress: bool = False) -> None:
        """Call ``kd.fit``, unless the checkpoint had a fitted state."""
        if self.kd is None or self.resumed:
            return
        start = seconds(self.device)
        self.kd.fit(batches, seed=seed, progress=progress)
        self.fit_seconds = seconds(self.device) - start
        self._save()

    def run(
        self,
        batches: Callable[[int], Batches],
        report: Callable[[], None] = lambda: None,
    ) -> None:
        """Run the remaining epochs.

        Args:
            batches: returns the batches of the epoch with this number.
            report: called after every epoch, before the checkpoint is written.
        """
        while self.epoch < self.recipe["epochs"]:
            start = seconds(self.device)
            self.model.train()
            means = optimise(batches(self.epoch), self.loss, self.optimizer, self.schedule)
            self.seconds.append(seconds(self.device) - start)
            self.curve.append(means)
            report()
            self._save()

    def loss(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Terms]:
        """The loss of a batch, and its terms."""
        x, y = (part.to(self.device, non_blocking=True) for part in batch)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            entropy = F.cross_entropy(self.forward(x), y)
            loss = self.ce_weight * entropy
            if self.distil is not None:
                loss = loss + self.distil(y)
        terms = {} if self.kd is None else self.kd.terms
        return loss, {"cross-entropy": entropy.detach(), **terms}

    def _parts(self) -> dict[str, Any]:
        """All that has a state."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        return parts if self.kd is None else parts | {"kd": self.kd}

    def _save(self) -> None:
        if self.checkpoint is None or not is_first():
            return
        state = {name: part.state_dict() for name, part in self._parts().items()} | {
            "curve": self.curve,
            "seconds": self.seconds,
            "fit_seconds": self.fit_seconds,
            "random": torch.get_rng_state(),
            "recipe": self.recipe,
        }
        save(state, self.checkpoint)

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        ours, theirs = flat(self.recipe), flat(saved["recipe"])
        known = (ours.keys() | theirs) - MEASURED
        keys = sorted(key for key in known if ours.get(key) != theirs.get(key))
        if keys:
            said = ", ".join(f"{k} {theirs.get(k)!r}, now {ours.get(k)!r}" for k in keys)
            raise SystemExit(
                f"{self.checkpoint} has another recipe ({said}); choose another --out, or delete "
                "the file to start again"
            )
        for name, part in self._parts().items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"].cpu())
        self.curve, self.seconds = saved["curve"], saved["seconds"]
        self.fit_seconds = saved["fit_seconds"]
        say(f"resuming after epoch {self.epoch}, from {self.checkpoint}")


def flat(recipe: Recipe, prefix: str = "") -> Recipe:
    """A nested recipe as ``{"teacher.network": "resnet56"}``."""
    found: Recipe = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def seconds(device: torch.device) -> float:
    """Process CPU time; on other devices wall-clock time, after all work there has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def device_of(model: nn.Module) -> torch.device:
    """The device of a model."""
    return next(model.parameters()).device


def device_name(device: torch.device | str) -> str:
    """The name of a GPU; other devices as they are."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else str(device)


def rank() -> int:
    """The rank of this process; 0 if there is only one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def say(text: str) -> None:
    """Print on one process only."""
    if is_first():
        print(text, flush=True)
