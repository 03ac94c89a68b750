"""Training loop of the recipes: SGD, a checkpoint after each epoch, accuracy of the last epoch."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

import kdlayers
from kdlayers import KDHandle, save_student

Batches = Iterable[tuple[Tensor, Tensor]]
Recipe = dict[str, Any]


class Training:
    """The training of a student, from the first epoch or from a checkpoint.

    Args:
        student: the network, with its KD layers attached.
        kd: its handle; ``None`` trains with labels only.
        recipe: all settings that affect the result, as JSON values: ``seed``, ``epochs``, ``lr``,
            ``milestones``, ``weight_decay``, ``ce_weight``, ``amp``, and any others.
        checkpoint: file written after every epoch; if it exists, training resumes from it.
        forward: the callable to run on images, such as a wrapper of the student or a compiled one;
            default: the student.
        compiled: whether to compile ``kd.loss`` too.
    """

    def __init__(
        self,
        student: nn.Module,
        kd: KDHandle | None,
        recipe: Recipe,
        checkpoint: Path,
        *,
        forward: Callable[[Tensor], Tensor] | None = None,
        compiled: bool = False,
    ) -> None:
        self.student, self.kd, self.recipe, self.checkpoint = student, kd, recipe, checkpoint
        self.forward = student if forward is None else forward
        self.distil = None if kd is None else torch.compile(kd.loss) if compiled else kd.loss
        self.device = next(student.parameters()).device
        self.epoch, self.seconds, self.fit_seconds = 0, 0.0, 0.0
        own = [] if kd is None else list(kd.parameters())
        self.optimizer = torch.optim.SGD(
            [*student.parameters(), *own],
            recipe["lr"],
            momentum=0.9,
            nesterov=True,
            weight_decay=recipe["weight_decay"],
        )
        if checkpoint.exists():
            self._resume()

    def fit(self, batches: Batches) -> None:
        """Call ``kd.fit``, unless the checkpoint had a fitted state."""
        if self.kd is None or self.fit_seconds:
            return
        start = time.perf_counter()
        self.kd.fit(batches, seed=self.recipe["seed"], progress=is_first())
        self.fit_seconds = time.perf_counter() - start
        self._save()

    def run(self, batches: Batches, test: Callable[[], tuple[float, float]], every: int) -> None:
        """Run the remaining epochs; ``test`` returns accuracies to print after some of them."""
        while self.epoch < self.recipe["epochs"]:
            start = time.perf_counter()
            lr = self._set_lr()
            loss = self._one_epoch(batches)
            if not math.isfinite(loss):
                raise SystemExit(f"the loss is {loss} in epoch {self.epoch + 1}: training diverged")
            self.epoch += 1
            self.seconds = time.perf_counter() - start
            self._save()
            line = f"epoch {self.epoch} of {self.recipe['epochs']}: loss {loss:.4f}"
            line += "".join(f", {name} {value:.4g}" for name, value in self._terms().items())
            line += f"; lr {lr:.2g}, {self.seconds:.1f} s"
            if every and self.epoch % every == 0:
                line += f"; test {test()[0]:.2f} %"
            say(line)

    def _one_epoch(self, batches: Batches) -> float:
        """Train on all batches; returns the mean loss."""
        # This seeds shuffling and augmentation, so that a resumed run sees the same images.
        torch.manual_seed(1_000_003 * self.recipe["seed"] + self.epoch + 7919 * rank())
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(self.epoch)
        self.student.train()
        total, count = torch.zeros((), device=self.device), 0
        for x, y in batches:
            x = x.to(self.device, non_blocking=True)
            y = y.to(self.device, non_blocking=True)
            with autocast(self.device, enabled=self.recipe["amp"]):
                loss = self.recipe["ce_weight"] * F.cross_entropy(self.forward(x), y)
                if self.distil is not None:
                    loss = loss + self.distil(y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total, count = total + loss.detach(), count + 1
        if not count:
            raise SystemExit("there are fewer images than the batch size: lower --batch-size")
        return (total / count).item()

    def _terms(self) -> dict[str, float]:
        """The unweighted values of the losses on the last batch."""
        terms = {} if self.kd is None else self.kd.terms
        plain = {k: v for k, v in terms.items() if k != "total" and not k.endswith(".weighted")}
        return {name: value.item() for name, value in plain.items()}

    def _set_lr(self) -> float:
        """The learning rate of this epoch, divided by 10 after each milestone."""
        passed = sum(milestone <= self.epoch for milestone in self.recipe["milestones"])
        lr = self.recipe["lr"] * 0.1**passed
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def _save(self) -> None:
        if not is_first():
            return
        state = {
            "model": self.student.state_dict(),
            "kd": None if self.kd is None else self.kd.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "seconds": self.seconds,
            "fit_seconds": self.fit_seconds,
            "recipe": self.recipe,
        }
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        # A run that is interrupted while writing keeps the previous checkpoint.
        fresh = self.checkpoint.with_suffix(".new")
        torch.save(state, fresh)
        fresh.replace(self.checkpoint)

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        ours, theirs = flat(self.recipe), flat(saved["recipe"])
        keys = sorted(key for key in ours.keys() | theirs if ours.get(key) != theirs.get(key))
        if keys:
            said = ", ".join(f"{k} {theirs.get(k)!r}, now {ours.get(k)!r}" for k in keys)
            raise SystemExit(
                f"{self.checkpoint} has another recipe ({said}); choose another --out, or delete "
                "the file to start again"
            )
        self.student.load_state_dict(saved["model"])
        if self.kd is not None:
            self.kd.load_state_dict(saved["kd"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]
        self.fit_seconds = saved["fit_seconds"]
        say(f"resuming after epoch {self.epoch}, from {self.checkpoint}")


def autocast(device: torch.device, *, enabled: bool) -> AbstractContextManager[Any]:
    """Autocast to bfloat16, which needs no loss scaling."""
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Batches) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in %.

    They are computed over the images of all ranks, in eval mode and full precision.
    """
    device = next(model.parameters()).device
    model.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in batches:
        logits, y = model(x.to(device)), y.to(device)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        seen = torch.tensor(len(y), device=device)
        counts += torch.stack([best[:, 0].sum(), best.any(1).sum(), seen])
    if dist.is_initialized():
        dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return 100 * top1 / images, 100 * top5 / images


def milestones(fractions: Iterable[float], epochs: int) -> list[int]:
    """Epochs at these fractions of the run."""
    return [round(fraction * epochs) for fraction in fractions]


def digest(model: nn.Module) -> str:
    """A hash of a network's weights, twelve hexadecimal digits."""
    sums = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sums.update(name.encode())
        sums.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return sums.hexdigest()[:12]


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def flat(recipe: Recipe, prefix: str = "") -> Recipe:
    """A nested recipe as ``{"teacher.network": "resnet56"}``."""
    found: Recipe = {}
    for key, value in recipe.items():
        name = f"{prefix}{key}"
        found |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return found


def finish(training: Training, test: Batches, published: Recipe, *, take_out: bool = False) -> None:
    """Detach the teacher, test and save the student, and print the result as one line of JSON.

    Args:
        training: the finished training.
        test: batches to test on.
        published: the published results.
        take_out: whether to remove the layers too, because they do not change the features.
    """
    if training.kd is not None:
        (training.kd.remove if take_out else training.kd.detach)()
    top1, top5 = accuracy(training.student, test)
    if not is_first():
        return
    recipe = training.recipe
    line = {key: recipe[key] for key in ("data", "pair", "method", "seed", "epochs")} | {
        "accuracy": round(top1, 2),
        "top5": round(top5, 2),
        "published": published,
        "parameters": parameters(training.student),
        "seconds_of_last_epoch": round(training.seconds, 2),
        "fit_seconds": round(training.fit_seconds, 1),
        "device": device_name(training.device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"kdlayers": kdlayers.__version__, "torch": torch.__version__},
        "recipe": recipe,
    }
    text = json.dumps(line)
    folder = training.checkpoint.parent
    save(training.student, folder / "student.pt")
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def save(student: nn.Module, path: Path) -> None:
    """Save a student with KD layers by `save_student`, others as a plain checkpoint."""
    if any(".kd." in name for name, _ in student.named_parameters()):
        save_student(student, path)
    else:
        torch.save({"model": student.state_dict()}, path)


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


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
