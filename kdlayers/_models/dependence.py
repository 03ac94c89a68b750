"""Which tensors a model's output depends on."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from kdlayers._models.examples import fresh, run_example, to_model
from kdlayers._models.trace import Trace
from kdlayers._models.undisturbed import undisturbed
from kdlayers._utils.tree import leaves, pick, put


def ignored(traced: Trace, example: tuple[Any, ...], names: Sequence[str]) -> set[str]:
    """The modules among ``names`` whose features do not affect the model's output."""
    model, features = traced.model, dict[str, Tensor]()

    def keep(name: str, output: Any) -> Any:
        # Replace the features, as a KD layer does. Parts of the output that were computed from the
        # original features, such as pooled features, do not count.
        path = traced.calls[name].path
        features[name] = pick(output, path).clone()
        return put(output, path, features[name])

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.enable_grad())
        for name in names:
            module = model.get_submodule(name)
            hook = module.register_forward_hook(lambda _m, _a, out, name=name: keep(name, out))
            stack.callback(hook.remove)
        args = tuple(_differentiable(arg) for arg in fresh(to_model(example, model)))
        outputs = [tensor for _, tensor in leaves(run_example(model, args, traced.label))]
        # Inside the context, because checkpointing runs parts again in the backward pass, which
        # must also be in eval mode.
        asked = [name for name, tensor in features.items() if tensor.requires_grad]
        reached = depend(outputs, [features[name] for name in asked])
    return {name for name, yes in zip(asked, reached, strict=True) if not yes}


def depend(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[bool]:
    """For each of ``inputs``, whether any of ``outputs`` depends on it. Frees their graph."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not inputs:
        return [False] * len(inputs)
    with torch.enable_grad():
        total = torch.stack([output.float().sum() for output in outputs]).sum()
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [isinstance(grad, Tensor) for grad in grads]  # None where nothing depends on it


def _differentiable(arg: Any) -> Any:
    """A floating-point input as a non-leaf tensor with a gradient, which frozen models need."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return arg.detach().requires_grad_().clone()
