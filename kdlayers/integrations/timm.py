"""A task of timm's train script with a distillation loss added to its own."""

from collections.abc import Callable
from functools import wraps
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from kdlayers._step.handle import KDHandle

METHODS = (MethodType, FunctionType)
"""The types of a task's methods; those of a ``KDTask`` that wraps another are functions."""
KEY = "kdlayers"
"""Where the handles' states are in the ``task_state`` of timm's checkpoints."""


class KDTask:
    r"""Any task of ``timm.task`` with :meth:`KDHandle.loss` added to its loss.

    .. math:: L = L_\text{task} + L_\text{KD}

    Everything else is the task's own: EMA, compilation, DDP, evaluation. timm's checkpoints then
    hold ``kd.state_dict()`` as well, and a resumed run loads it. It does not import timm, and it is
    not an ``nn.Module``, so no checkpoint contains the teacher.

    Args:
        task: the task that the script has made, such as ``ClassificationTask`` or one of timm's own
            distillations, whose trainable module is the student or contains it; or a ``KDTask`` of
            another handle of the student.
        kd: the handle of the student.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDLoss, attach_kd
        >>> from kdlayers.integrations.timm import KDTask
        >>> class Task(nn.Module):
        ...     def __init__(self, model):
        ...         super().__init__()
        ...         self.trainable_module = model
        ...
        ...     def forward(self, input, target):
        ...         output = self.trainable_module(input)
        ...         return {"loss": nn.functional.cross_entropy(output, target), "output": output}
        >>> student, teacher = resnet18(num_classes=3), resnet18(num_classes=3)
        >>> images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
        >>> task = KDTask(Task(student), attach_kd(student, teacher, losses=[KDLoss()]))
        >>> sorted(task(images, labels))
        ['kd_loss', 'loss', 'output']
    """

    def __init__(self, task: nn.Module, kd: KDHandle) -> None:
        self.task: Any = task
        self.kd = kd

    def __getattr__(self, name: str) -> Any:
        """Forward all other attributes to the task; methods that return the task return this."""
        if name.startswith("__") or name == "task":  # copying and pickling ask before it exists
            raise AttributeError(name)
        found = getattr(self.task, name)
        return self._returning_this(found) if isinstance(found, METHODS) else found

    def _returning_this(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """``method``; where it returns the task, as ``to`` and ``train`` do, return this."""

        @wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            returned = method(*args, **kwargs)
            return self if returned is self.task else returned

        return call

    def __call__(self, images: Any, target: Tensor) -> dict[str, Tensor]:
        """The task's results, with the distillation loss added to ``loss``, and as ``kd_loss``.

        In eval mode, which the handle does not record, the results are only the task's.
        """
        result: dict[str, Tensor] = self.task(images, target)
        if not self.kd.student.training:
            return result
        loss = self.kd.loss(target)
        inner = result.get("kd_loss")  # of another handle
        whole = loss if inner is None else inner + loss
        return {**result, "loss": result["loss"] + loss, "kd_loss": whole}

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Return the task's parameters and the train-only parameters."""
        own = self.task.get_clip_parameters(exclude_head=exclude_head)
        return [*own, *self.kd.parameters()]

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Return the task's state; the handle's state is stored with the trained weights only."""
        state: dict[str, Any] = self.task.get_checkpoint_state(ema=ema, **kwargs)
        if not ema:
            inner = state.get("task_state", {})
            states = [*inner.get(KEY, []), self.kd.state_dict()]
            state["task_state"] = {**inner, KEY: states}
        return state

    def load_checkpoint_state(
        self, state_dict: dict[str, Any], task_state: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Load a state of :meth:`get_checkpoint_state`, or a checkpoint of a plain student."""
        own = dict(task_state or {})
        *inner, kd = own.pop(KEY, []) or [None]
        if inner:
            own[KEY] = inner
        self.task.load_checkpoint_state(state_dict, own or None, **kwargs)
        if kd is not None:
            self.kd.load_state_dict(kd)
