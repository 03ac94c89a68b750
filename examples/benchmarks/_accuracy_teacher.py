"""A teacher from a checkpoint, and whether it is what it claims to be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from _accuracy_data import Splits
from _accuracy_train import accuracy, macs, new_model, parameters
from models.cifar_resnet import fold_batch_norm
from models.teachers import load_teacher
from torch import nn

NEAR = 0.5  # points of accuracy by which a teacher may miss what it claims


def given_teacher(
    path: Path, network: str, splits: Splits, cache: Path, claimed: float | None
) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a checkpoint, batch norms folded, and what is known about it.

    Args:
        path: a file of weights, under our names or those of the usual CIFAR teachers.
        network: the name of the network, such as ``resnet56``.
        splits: images of the teacher's classes, which it is tested on.
        cache: where the accuracy is kept, which takes a minute to measure.
        claimed: test accuracy in % that the file should have; ``None``: it is printed only.

    Raises:
        SystemExit: if the file does not fit the network, or its accuracy the claim.
    """
    teacher = new_model(network, splits, 0)
    load_teacher(teacher, network, path)
    teacher = fold_batch_norm(teacher)
    content = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    images = hashlib.sha256(splits.test.images.numpy().tobytes()).hexdigest()[:12]
    kept = cache / f"teacher-{content}-{images}.json"
    if not kept.exists():
        facts = {
            "recipe": {"file": path.name, "network": network},
            "recipe_hash": content,
            "parameters": parameters(teacher),
            "macs": macs(teacher, splits),
            "test_accuracy": accuracy(teacher, splits.test),
        }
        cache.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(facts), "utf-8")
    facts = json.loads(kept.read_text("utf-8"))
    found = facts["test_accuracy"]
    print(f"teacher {path.name}: {found:.2f} % of the test images", flush=True)
    if claimed is not None and abs(found - claimed) > NEAR:
        raise SystemExit(
            f"{path} has {found:.2f} % of the test images, not {claimed:.2f} % as "
            "--teacher-accuracy says: is it of other classes, or its images normalised otherwise?"
        )
    return teacher, facts
