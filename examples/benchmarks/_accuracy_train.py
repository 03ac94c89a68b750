"""Training, testing and counting, shared by all methods of the benchmark."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from _accuracy_data import Augmented, Split, Splits
from _accuracy_progress import Progress
from models.cifar_resnet import fold_batch_norm, make
from models.small_torchvision import mobilenet_v2, vgg
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from kdlayers import KDHandle

Recipe = dict[str, Any]


class Batches(Protocol):
    """The batches that a network is trained on."""

    steps: int
    """Number of batches in an epoch."""

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of one epoch."""
        ...


SMALL_TORCHVISION: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": mobilenet_v2, "vgg": vgg}


def digest(recipe: Recipe) -> str:
    """A hash of a recipe, twelve hexadecimal digits. It does not depend on the order of keys."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def new_model(name: str, splits: Splits, seed: int, **options: float) -> nn.Module:
    """A network for these images, with the initial weights of ``seed``."""
    torch.manual_seed(seed)
    if name in SMALL_TORCHVISION:
        small = SMALL_TORCHVISION[name]
        model: nn.Module = small(splits.classes, in_channels=splits.channels, **options)
    else:
        model = make(name, num_classes=splits.classes, in_channels=splits.channels, **options)
    return model.to(memory_format=torch.channels_last)


def train(
    model: nn.Module,
    kd: KDHandle | None,
    batches: Batches,
    recipe: Recipe,
    progress: Progress,
    ce_weight: float = 1.0,
) -> float:
    """Train with SGD and a one-cycle learning rate; returns seconds per epoch.

    On a CPU they are seconds of process CPU time, which do not count other processes. On other
    devices they are wall-clock seconds.

    Args:
        model: the network.
        kd: the handle, if the method has a teacher.
        batches: the batches of each epoch.
        recipe: epochs, lr, weight_decay and precision.
        progress: the checkpoint to resume from and to write.
        ce_weight: weight of the cross-entropy; ``kd.loss`` is added to it.
    """
    device = device_of(model)
    own = list(kd.parameters()) if kd is not None else []
    optimizer = torch.optim.SGD(
        [*model.parameters(), *own],
        recipe["lr"],
        momentum=0.9,
        nesterov=True,
        weight_decay=recipe["weight_decay"],
    )
    steps = recipe["epochs"] * batches.steps
    schedule = OneCycleLR(
        optimizer, recipe["lr"], total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    low = recipe["precision"] == "bfloat16"
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "kd": kd}
    model.train()
    for epoch in range(progress.resume(parts), recipe["epochs"]):
        start = seconds(device)
        sums: dict[str, Tensor] = {}
        for x, y in batches.epoch(epoch):
            with torch.autocast(device.type, torch.bfloat16, enabled=low):
                entropy = F.cross_entropy(model(x), y)
                loss = ce_weight * entropy
                if kd is not None:
                    loss = loss + kd.loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            terms = {} if kd is None else kd.terms
            for name, value in {"cross-entropy": entropy.detach(), **terms}.items():
                sums[name] = sums.get(name, 0.0) + value
        means = {name: float(f"{float(value) / batches.steps:.5g}") for name, value in sums.items()}
        progress.keep(parts, epoch + 1, seconds(device) - start, means)
    return progress.seconds / recipe["epochs"]


def seconds(device: torch.device) -> float:
    """Process CPU time; on other devices wall-clock time, after all work there has finished."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def device_of(model: nn.Module) -> torch.device:
    """The device of a model."""
    return next(model.parameters()).device


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Percentage of images whose class has the largest logit, in float32 and eval mode."""
    model.eval()
    batches = split.to(device_of(model)).batches(500)
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * right / len(split)


def trained_teacher(
    splits: Splits, recipe: Recipe, cache: Path, device: str = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """The teacher of a recipe; it is trained on all training images once and stored in ``cache``.

    Returns the teacher with folded batch norms, as for deployment, and facts about it.
    """
    path = cache / f"teacher-{digest(recipe)}.pt"
    teacher = new_model(recipe["network"], splits, recipe["seed"]).to(device)
    if not path.exists():
        print(f"training the teacher, {recipe['network']}: {path}", flush=True)
        batches = Augmented(splits.train.to(device_of(teacher)), recipe | {"flips": True})
        spent = train(teacher, None, batches, recipe, Progress(None))
        facts = {
            "recipe": recipe,
            "recipe_hash": digest(recipe),
            "parameters": parameters(teacher),
            "macs": macs(teacher, splits),
            "training_accuracy": accuracy(teacher, splits.train),
            "validation_accuracy": accuracy(teacher, splits.validation),
            "test_accuracy": accuracy(teacher, splits.test),
            "seconds_per_epoch": round(spent, 2),
        }
        cache.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that an interrupted run does not leave an incomplete file.
        torch.save({"model": teacher.state_dict(), "facts": facts}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
    saved = torch.load(path, weights_only=True, map_location=device)
    teacher.load_state_dict(saved["model"])
    return fold_batch_norm(teacher), saved["facts"]


def parameters(model: nn.Module, _: Splits | None = None) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def macs(model: nn.Module, splits: Splits) -> int:
    """Multiply-adds of convolutions and matrix products for one image, with the KD layers."""
    image: Tensor = splits.test.take(torch.tensor([0])).to(device_of(model)).batches(1)[0][0]
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


def matching_width(name: str, splits: Splits, target: int, count: Callable[..., int]) -> float:
    """The width for which ``count(model, splits)`` is nearest to ``target``."""
    widths = [4 + step / 4 for step in range(4 * 60)]
    counts = {}
    for width in widths:
        counts[width] = count(new_model(name, splits, 0, width=width), splits)
        if counts[width] > target:
            break
    return min(counts, key=lambda width: abs(counts[width] - target))
