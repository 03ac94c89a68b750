"""Training of the recipes: a rate that falls at milestones, a line for each epoch, the result."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common.testing import accuracy, parameters
from common.training import Batches, Recipe, Training, device_name, is_first, rank, say
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DistributedSampler

import kdlayers
from kdlayers import KDHandle, save_student


def milestones(fractions: Iterable[float], epochs: int) -> list[int]:
    """Epochs at these fractions of the run."""
    return [round(fraction * epochs) for fraction in fractions]


def factor(recipe: Recipe, epoch: int) -> float:
    """The factor of the learning rate in an epoch: a tenth after each milestone."""
    return 0.1 ** sum(milestone <= epoch for milestone in recipe["milestones"])


def train(
    model: nn.Module,
    kd: KDHandle | None,
    recipe: Recipe,
    batches: Batches,
    fit_on: Batches,
    test: Batches,
    folder: Path,
    args: argparse.Namespace,
    **options: Any,
) -> Training:
    """Train for all epochs, and print a line for each, some with the test accuracy.

    Args:
        model: the network, with its KD layers attached.
        kd: its handle; ``None`` trains with labels only.
        recipe: the recipe, with ``seed``, ``milestones``, ``ce_weight`` and ``amp``.
        batches: batches to train on.
        fit_on: batches for ``kd.fit``.
        test: batches to test on, every ``args.test_every`` epochs.
        folder: folder of the checkpoint, from which training resumes.
        args: the command line.
        options: ``forward`` and ``compiled`` of `Training`.
    """
    steps = len(batches)
    if not steps:
        size = recipe["batch_size"]
        raise SystemExit(
            f"the training images do not fill a batch of {size}: use more images or a smaller batch"
        )

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: factor(recipe, step // steps))

    def seeded(epoch: int) -> Batches:
        # This seeds shuffling and augmentation, so that a resumed run sees the same images.
        torch.manual_seed(1_000_003 * recipe["seed"] + epoch + 7919 * rank())
        sampler = getattr(batches, "sampler", None)
        if isinstance(sampler, DistributedSampler):
            sampler.set_epoch(epoch)
        return batches

    how = {"ce_weight": recipe["ce_weight"], "bfloat16": recipe["amp"]}
    training = Training(model, kd, recipe, schedule, folder / "checkpoint.pt", **how, **options)
    training.fit(fit_on, recipe["seed"], progress=is_first())
    training.run(seeded, lambda: report(training, test, args.test_every))
    return training


def report(training: Training, test: Batches, every: int) -> None:
    """Print a line about an epoch, every few epochs with the test accuracy."""
    recipe, terms, epoch = training.recipe, training.curve[-1], training.epoch
    loss = recipe["ce_weight"] * terms["cross-entropy"] + terms.get("total", 0.0)
    if not math.isfinite(loss):
        raise SystemExit(f"the loss is {loss} in epoch {epoch}: training diverged")
    line = f"epoch {epoch} of {recipe['epochs']}: loss {loss:.4f}"
    for name, value in terms.items():
        if name != "total" and not name.endswith(".weighted"):
            line += f", {name} {value:.4g}"
    line += f"; lr {recipe['lr'] * factor(recipe, epoch - 1):.2g}, {training.seconds[-1]:.1f} s"
    if every and epoch % every == 0:
        share_buffers(training.model)
        line += f"; test {accuracy(training.model, test).top1:.2f} %"
    say(line)


def measured(teacher: nn.Module, name: str, test: Batches) -> Recipe:
    """Print the accuracy of a teacher; returns facts about it."""
    top1 = accuracy(teacher, test).top1
    say(f"teacher {name}: {top1:.2f} % of the test images")
    return {"network": name, "weights": digest(teacher), "accuracy": round(top1, 2)}


def share_buffers(model: nn.Module) -> None:
    """Give all processes the first one's buffers, as DDP does only before a training forward."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def digest(model: nn.Module) -> str:
    """A hash of a network's weights, twelve hexadecimal digits."""
    sums = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        sums.update(name.encode())
        sums.update(value.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return sums.hexdigest()[:12]


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
    share_buffers(training.model)
    found = accuracy(training.model, test)
    if not is_first():
        return
    recipe = training.recipe
    line = {key: recipe[key] for key in ("data", "pair", "method", "seed", "epochs")} | {
        "accuracy": round(found.top1, 2),
        "top5": round(found.top5, 2),
        "published": published,
        "parameters": parameters(training.model),
        "seconds_of_last_epoch": round(next(reversed(training.seconds), 0.0), 2),
        "fit_seconds": round(training.fit_seconds, 1),
        "device": device_name(training.device),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {"kdlayers": kdlayers.__version__, "torch": torch.__version__},
        "recipe": recipe,
    }
    text = json.dumps(line)
    folder = training.checkpoint.parent
    save_weights(training.model, folder / "student.pt")
    (folder / "result.json").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)


def save_weights(student: nn.Module, path: Path) -> None:
    """Save a student with KD layers by `save_student`, others as a plain checkpoint."""
    if any(".kd." in name for name, _ in student.named_parameters()):
        save_student(student, path)
    else:
        torch.save({"model": student.state_dict()}, path)
