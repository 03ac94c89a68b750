"""Candidate points: the stages and blocks of a model that can take a KD layer."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.fx import GraphModule

from kdlayers._models.dependence import ignored
from kdlayers._models.detectors import BACKBONE, inside, is_detector
from kdlayers._models.examples import example_for
from kdlayers._models.trace import Call, Trace, trace
from kdlayers._models.wrappers import innermost
from kdlayers._utils.table import table
from kdlayers._utils.torch_internals import is_batch_norm, runs_forward_of
from kdlayers.errors import ArgumentTypeError, LayoutError


@dataclass(frozen=True)
class Candidate:
    """A module that can take a KD layer: its name, output shape (of the example) and layout."""

    name: str
    shape: tuple[int, ...]
    layout: str
    remark: str = field(default="", repr=False)
    """A remark on the candidate; usually empty."""


class Candidates(list[Candidate]):
    """Candidate points in forward order; prints as a table, with the remarks below it."""

    left_out: dict[str, str]
    """Stages and blocks that cannot be points, with the reason."""

    def __repr__(self) -> str:
        rows = [("name", "shape", "layout")]
        rows += [(c.name, "x".join(map(str, c.shape)), c.layout) for c in self]
        lines = [table(rows)]
        lines += [f"{names}: {said}" for said, names in _grouped((c.name, c.remark) for c in self)]
        left_out = getattr(self, "left_out", {})
        lines += [f"not listed, {n}: {said}" for said, n in _grouped(left_out.items())]
        return "\n".join(lines)


def _grouped(remarks: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each sentence once, with its names; of many names only the first and the last."""
    groups: dict[str, list[str]] = {}
    for name, said in remarks:
        if said:
            groups.setdefault(said, []).append(name)
    return [
        (said, ", ".join(names) if len(names) < 4 else f"{names[0]}, ..., {names[-1]}")
        for said, names in groups.items()
    ]


def find_points(model: nn.Module, example: Any = None) -> Candidates:
    """Stages and blocks of ``model`` that can take a KD layer, in forward order.

    Runs the model in eval mode, once plainly and once with gradients, without changing it. A
    candidate has parameters, runs once in a forward and returns features of a known layout. The
    list has stages and blocks, not the modules inside blocks; you can name any other module that
    runs once. Remarks below the table say where the model's output does not depend on a candidate,
    where a later module changes its output in place (a copy is recorded then), and which blocks are
    not listed: their layout is unknown, or they did not run, as in a traced or exported graph.

    Args:
        model: any ``nn.Module`` that takes images; of a detector of torchvision the points of its
            backbone are listed.
        example: a small batch of images (or a tuple of arguments); default: two zero images of the
            size that the model states, else 224.

    Returns:
        A list of candidates, each with ``.name``, ``.shape``, ``.layout`` and ``.remark``.

    Raises:
        ArgumentError: if the model cannot run on the example.
        ArgumentTypeError: if ``model`` is not a module.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import find_points
        >>> find_points(resnet18(), torch.zeros(2, 3, 64, 64))[-1]
        Candidate(name='layer4', shape=(2, 512, 2, 2), layout='NCHW')
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"find_points(model) takes a torch.nn.Module, got {type(model).__name__}"
        )
    args = example_for(model, example)
    prefix = f"{BACKBONE}." if is_detector(model) else ""
    model = inside(model)
    traced = trace(model, args, "model")
    names = dict(_stages_and_blocks(model))
    calls = [call for call in traced.calls.values() if call.name in names]
    unread = ignored(traced, args, [call.name for call in calls])
    found = Candidates()
    found.left_out = _silent(model, names, traced)
    for call in sorted(calls, key=lambda call: call.order):
        if call.calls > 1:
            found.left_out[call.name] = f"it runs {call.calls} times in one forward"
            continue
        if call.shared > 1:
            found.left_out[call.name] = f"it {call.ending}"
            continue
        try:
            layout = traced.layout(call.name)
        except LayoutError as error:
            found.left_out[call.name] = _reason(error, call.name)
            continue
        if layout.kind != "vector":
            remark = _remark(call, call.name in unread)
            found.append(Candidate(prefix + call.name, call.shape, str(layout), remark))
    found.left_out = {prefix + name: said for name, said in found.left_out.items()}
    return found


def _silent(model: nn.Module, modules: Mapping[str, nn.Module], traced: Trace) -> dict[str, str]:
    """Stages and blocks that returned no features in the dry run, without those inside them."""
    graph = isinstance(innermost(model), GraphModule)
    said = "it did not run, or its output is not a floating-point tensor"
    if graph:
        said = (
            "a traced or exported graph does not run the blocks of its model; call attach_kd with "
            "the model itself, before it is traced"
        )
    silent: dict[str, str] = {}
    for name, module in modules.items():
        within = any(name.startswith(f"{outer}.") for outer in silent)
        if name not in traced.calls and not within and (graph or _has_forward(module)):
            silent[name] = said
    return silent


def _has_forward(module: nn.Module) -> bool:
    lists = (nn.ModuleList, nn.ModuleDict)
    return not isinstance(module, lists) and not runs_forward_of(module, nn.Module)


def _reason(error: LayoutError, name: str) -> str:
    """The error message about ``name``, without the advice to call find_points."""
    said = re.sub(r"(; choose another point)?[;,] find_points\(model\) lists .*", "", str(error))
    return said.replace(repr(name), "this module")


def _remark(call: Call, unread: bool) -> str:
    if unread:
        return (
            "the model's output does not depend on these features, so a KD layer is refused here; "
            "choose an earlier point"
        )
    if call.changed:
        return (
            "a later module changes the features in place, so losses on features record a copy of "
            "them, which takes the memory of one more map"
        )
    return ""


def _stages_and_blocks(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, child in innermost(model).named_children():
        child = innermost(child)
        bare = not any(True for _ in child.parameters()) or _depth(child) == 0
        if bare or is_batch_norm(child):
            continue
        yield prefix + name, child
        if _is_stage(child):
            yield from _stages_and_blocks(child, f"{prefix}{name}.")


def _is_stage(module: nn.Module) -> bool:
    """A container of blocks, or a module that holds such a container."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if isinstance(module, containers):
        return any(_depth(child) >= 1 for child in module.children())
    return any(
        any(_depth(part) >= 2 for part in child.children())
        if isinstance(child, containers)
        else _is_stage(child)  # a wrapper, such as the ``encoder`` of Hugging Face's models
        for child in module.children()
    )


def _depth(module: nn.Module) -> int:
    return max((1 + _depth(child) for child in module.children()), default=0)
