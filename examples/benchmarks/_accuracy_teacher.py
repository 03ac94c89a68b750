"""The teacher of the accuracy benchmark: trained here, or from a file and then tested."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from _accuracy_data import Splits
from _accuracy_train import digest, macs, new_model, one_cycle
from common.files import save
from common.images import Augmented
from common.teachers import load_teacher
from common.testing import accuracy, parameters
from common.training import Recipe
from models.cifar_resnet import fold_batch_norm
from torch import nn

NEAR = 0.5  # tolerated difference to the claimed accuracy, in points


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
        train = splits.train.to(device)
        batches = Augmented(train, recipe["batch_size"], recipe["padding"], seed=recipe["seed"])
        training = one_cycle(teacher, None, recipe, len(batches))
        training.run(batches.epoch)
        facts = {
            "recipe": recipe,
            "recipe_hash": digest(recipe),
            "parameters": parameters(teacher),
            "macs": macs(teacher, splits),
            "training_accuracy": accuracy(teacher, splits.train.batches()).top1,
            "validation_accuracy": accuracy(teacher, splits.validation.batches()).top1,
            "test_accuracy": accuracy(teacher, splits.test.batches()).top1,
            "seconds_per_epoch": round(sum(training.seconds) / recipe["epochs"], 2),
        }
        save({"model": teacher.state_dict(), "facts": facts}, path)
    facts = load_teacher(teacher, recipe["network"], path)
    return fold_batch_norm(teacher), facts


def given_teacher(
    path: Path, network: str, splits: Splits, cache: Path, claimed: float | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, with folded batch norms, and facts about it.

    Args:
        path: a file of weights, with our names or those of the usual CIFAR teachers.
        network: the name of the network, such as ``resnet56``.
        splits: images of the teacher's classes, to measure its accuracy.
        cache: folder to store the accuracy in; measuring takes a minute.
        claimed: test accuracy in % that the teacher should have; ``None``: it is only printed.

    Raises:
        SystemExit: if the weights do not fit the network, or the accuracy is not as claimed.
    """
    teacher = new_model(network, splits, 0)
    load_teacher(teacher, network, path)
    teacher = fold_batch_norm(teacher)
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    images = hashlib.sha256(splits.test.pixels.numpy().tobytes()).hexdigest()[:12]
    kept = cache / f"teacher-{content}-{images}.json"
    if not kept.exists():
        facts = {
            "recipe": {"file": path.name, "network": network},
            "recipe_hash": content,
            "parameters": parameters(teacher),
            "macs": macs(teacher, splits),
            "test_accuracy": accuracy(teacher, splits.test.batches()).top1,
        }
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(facts), "utf-8")
    facts = json.loads(kept.read_text("utf-8"))
    found = facts["test_accuracy"]
    print(f"teacher {path.name}: {found:.2f} % of the test images", flush=True)
    if claimed is not None and abs(found - claimed) > NEAR:
        raise SystemExit(
            f"{path} has a test accuracy of {found:.2f} %, not {claimed:.2f} % as "
            "--teacher-accuracy says: does it use other classes or another normalisation?"
        )
    return teacher, facts
