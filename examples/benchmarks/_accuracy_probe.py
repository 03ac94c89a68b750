"""Probes of a trained student: its features before and after the KD layers, and pruning."""

from __future__ import annotations

import copy
from typing import Any

import torch
from _accuracy_data import Splits
from _accuracy_train import macs
from common.images import Images
from common.testing import accuracy, parameters
from common.training import device_of
from torch import Tensor, nn

from kdlayers import prune_templates

BUDGETS = (0.05, 0.3, 0.4)


def probes(student: nn.Module, last: str, train: Images, test: Images) -> dict[str, float]:
    """Accuracy in % of a linear discriminant on pooled features, fitted to the student's images.

    Args:
        student: a trained student.
        last: the point whose output the classifier pools.
        train: images to fit the discriminant to.
        test: images to measure it on.

    Returns:
        ``"last"``: accuracy on the features that the classifier sees; ``NAME.before`` and
        ``NAME.after``: accuracies on the input and output of each KD layer.
    """
    fitted, tested = (pooled(student, last, split) for split in (train, test))
    return {
        name: round(discriminant(fitted[name], train.labels, tested[name], test.labels), 2)
        for name in fitted
    }


@torch.no_grad()
def pooled(student: nn.Module, last: str, split: Images) -> dict[str, Tensor]:
    """Features of all images, averaged over positions, for each of the names above."""
    found: dict[str, list[Tensor]] = {}

    def keep(name: str, maps: Tensor) -> None:
        found.setdefault(name, []).append(maps.mean((2, 3)))

    def layer_hook(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
            keep(f"{name}.before", inputs[0])
            keep(f"{name}.after", output[0])

        return hook

    hooks = [
        module.register_forward_hook(layer_hook(name.removesuffix(".kd")))
        for name, module in student.named_modules()
        if name.endswith(".kd")
    ]
    # Registered last, so this hook sees the output after the KD layer's own hook has changed it.
    output = student.get_submodule(last)
    hooks.append(output.register_forward_hook(lambda _, __, maps: keep("last", maps)))
    try:
        student.eval()
        for x, _ in split.to(device_of(student)).batches():
            student(x)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts).cpu() for name, parts in found.items()}


def discriminant(train: Tensor, labels: Tensor, test: Tensor, truth: Tensor) -> float:
    """Accuracy in % of linear discriminant analysis, in float64, with equal class priors."""
    train, test = train.double(), test.double()
    means = torch.stack([train[labels == label].mean(0) for label in labels.unique()])
    centred = train - means[labels]
    within = centred.T @ centred / len(train)
    # Channels that are always zero make the covariance singular.
    directions = torch.linalg.pinv(within, hermitian=True, rtol=1e-8) @ means.T
    scores = test @ directions - 0.5 * (means.T * directions).sum(0)
    return 100 * (scores.argmax(1) == truth).double().mean().item()


def pruned(student: nn.Module, train: Images, test: Images, splits: Splits) -> list[dict[str, Any]]:
    """Size and accuracy after removing templates that fire at few positions of ``train``."""
    results = []
    for budget in BUDGETS if any(".kd." in n for n, _ in student.named_parameters()) else ():
        smaller = copy.deepcopy(student)
        layers = prune_templates(smaller, train.to(device_of(student)).batches(), budget=budget)
        results.append(
            {
                "budget": budget,
                "templates": {layer.name: layer.after for layer in layers},
                "parameters": parameters(smaller),
                "macs": macs(smaller, splits),
                "accuracy": accuracy(smaller, test.batches()).top1,
            }
        )
    return results
