"""A task of timm's train script with a distillation added to its loss."""

from typing import Any

from torch import Tensor, nn

from kdlayers._step.handle import KDHandle

KEY = "kdlayers"
"""Where the handle's state is in the ``task_state`` of timm's checkpoints."""


class KDTask:
    r"""Any task of ``timm.task`` with :meth:`KDHandle.loss` added to its loss.

    .. math:: L = L_\text{task} + L_\text{KD}

    Everything else is the task's own: EMA, compilation, DDP, evaluation. timm's checkpoints then
    hold ``kd.state_dict()`` as well, and a resumed run takes it back. It needs no import of timm,
    and is no ``nn.Module``: the teacher gets into no checkpoint.

    Args:
        task: the task that the script has made, such as ``ClassificationTask`` or one of timm's own
            distillations, whose trainable module is the student or contains it.
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
        """What is not the wrapper's own is the task's."""
        if name.startswith("__") or name == "task":  # copies and pickles ask before it is there
            raise AttributeError(name)
        return getattr(self.task, name)

    def __call__(self, images: Any, target: Tensor) -> dict[str, Tensor]:
        """The task's results; ``loss`` with the distillation added, ``kd_loss`` alone.

        In eval mode, which the handle does not record, they are the task's as they are.
        """
        result: dict[str, Tensor] = self.task(images, target)
        if not self.kd.student.training:
            return result
        loss = self.kd.loss(target)
        return {**result, "loss": result["loss"] + loss, "kd_loss": loss}

    def prepare_distributed(self, *args: Any, **kwargs: Any) -> "KDTask":
        """The task's, which wraps the student in DDP."""
        self.task.prepare_distributed(*args, **kwargs)
        return self

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """The task's, and the train-only ones."""
        own = self.task.get_clip_parameters(exclude_head=exclude_head)
        return [*own, *self.kd.parameters()]

    def get_checkpoint_state(self, ema: bool = False, **kwargs: Any) -> dict[str, Any]:
        """The task's, with the handle's state once, beside the weights that are trained."""
        state: dict[str, Any] = self.task.get_checkpoint_state(ema=ema, **kwargs)
        if not ema:
            state["task_state"] = {**state.get("task_state", {}), KEY: self.kd.state_dict()}
        return state

    def load_checkpoint_state(
        self, state_dict: dict[str, Any], task_state: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """What :meth:`get_checkpoint_state` gave; a plain student's checkpoint is taken too."""
        own = dict(task_state or {})
        kd = own.pop(KEY, None)
        self.task.load_checkpoint_state(state_dict, own or None, **kwargs)
        if kd is not None:
            self.kd.load_state_dict(kd)
