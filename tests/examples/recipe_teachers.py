"""Weights under the names that the usual CIFAR teachers have."""

import torch
from _cifar100 import network


def theirs(name):
    """A network's weights under the names of the usual CIFAR teachers."""
    torch.manual_seed(5)
    model = network(name)
    state = {}
    for key, value in model.state_dict().items():
        if name.startswith("wrn"):
            for stage in "123":
                key = key.replace(f"layer{stage}.", f"block{stage}.layer.")
            key = key.replace("shortcut", "convShortcut").replace("last.0.", "bn1.")
        elif name == "resnet50":
            key = key.replace("stem.0.", "conv1.").replace("stem.1.", "bn1.")
            key = key.replace("fc.", "linear.")
        else:
            key = key.replace("shortcut", "downsample")
        state[key] = value
    return model, state
