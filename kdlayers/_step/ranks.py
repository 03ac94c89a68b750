"""Keeps train-only parameters equal on all ranks of ``torch.distributed``."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Variable

from kdlayers._step.terms import Term
from kdlayers._utils.distributed import world_size
from kdlayers._utils.torch_internals import current_backward, joined, runs_on_all_ranks
from kdlayers.errors import CaptureError
from kdlayers.losses._teacher_norm import TeacherNorm


class Ranks:
    """Broadcasts the values of rank 0, and averages the gradients after each backward pass.

    It is for parameters that no DistributedDataParallel holds. The gradients are averaged at the
    end of every backward pass through the student's logits or through the KD loss. So a rank whose
    step has no KD loss contributes zeros. Averaging gradients twice does not change them, so
    gradient accumulation is correct.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], names: Sequence[str]) -> None:
        self.parameters = list(parameters)
        self.names = ", ".join(names)
        self.paused = False
        """Whether the backward passes that run now are not those of a training step."""
        self._group: Any = None
        self._backward: int | None = None

    def start(self) -> None:
        """Broadcast the values of rank 0, once after the process group was initialised."""
        if world_size() > 1 and self._group is not dist.group.WORLD:
            for parameter in self.parameters:
                _broadcast(parameter.data)
            self._group = dist.group.WORLD

    def forward(self, student: nn.Module) -> bool:
        """Prepare a forward; returns whether all ranks run it.

        Raises:
            CaptureError: inside DistributedDataParallel's ``join()``.
        """
        if world_size() == 1 or not runs_on_all_ranks(student):
            return False
        if joined():
            raise CaptureError(
                f"{self.names}: these losses average gradients of their parameters, or statistics, "
                "over all ranks, but inside DistributedDataParallel.join() a rank may have no "
                "batch left; give all ranks the same number of batches, for instance with "
                "DataLoader(..., drop_last=True) and DistributedSampler(..., drop_last=True), or "
                "use losses without either"
            )
        self.start()
        return True

    @contextmanager
    def pause(self) -> Generator[None, None, None]:
        """Average nothing inside the block, whose backward passes may differ from rank to rank."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False

    def average_after(self, tensor: Tensor) -> None:
        """Average the gradients at the end of a backward pass through ``tensor``."""
        if world_size() > 1 and tensor.requires_grad:
            tensor.register_hook(self._queue)

    def _queue(self, _: Tensor) -> None:
        if self.paused:
            return
        backward = current_backward()
        if backward == -1 or backward != self._backward:
            self._backward = backward
            engine: Any = Variable._execution_engine  # pyright: ignore[reportPrivateUsage]
            queue: Callable[[Callable[[], None]], None] = engine.queue_callback
            queue(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        """Average all gradients in one reduction; a gradient that no rank has stays None."""
        if world_size() == 1:
            return  # the process group was destroyed
        for kind in dict.fromkeys((p.device, p.dtype) for p in self.parameters):
            _average_alike([p for p in self.parameters if (p.device, p.dtype) == kind])


def _broadcast(values: Tensor) -> None:
    """Replace ``values`` by those of rank 0."""
    if values.is_cpu and "cpu" not in dist.get_backend_config():
        # NCCL alone takes no tensors of the CPU, where a loss may be until its student has moved.
        held = [values]
        dist.broadcast_object_list(held, src=0)
        values.copy_(held[0])
    else:
        dist.broadcast(values, src=0)


def _average_alike(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of parameters that share device and dtype."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = grads[0].new_tensor([float(p.grad is not None) for p in parameters])
    flat = torch.cat([present, *(grad.flatten() for grad in grads)])
    dist.all_reduce(flat)
    counts, *means = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, count, mean, grad in zip(parameters, counts, means, grads, strict=True):
        grad.copy_((mean / world_size()).view_as(grad))
        if parameter.grad is None and count > 0:  # another rank has one
            parameter.grad = grad


def ranks_of(terms: Sequence[Term]) -> Ranks | None:
    """A `Ranks` for the terms with train-only parameters or a `TeacherNorm`; None without both."""
    owners = {term.name: list(term.loss.parameters()) for term in terms}
    parameters = list(dict.fromkeys(p for group in owners.values() for p in group))
    normed = [t.name for t in terms if any(isinstance(m, TeacherNorm) for m in t.loss.modules())]
    names = [name for name, group in owners.items() if group or name in normed]
    return Ranks(parameters, names) if names else None
