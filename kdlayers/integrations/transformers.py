"""Hugging Face's Trainer with a distillation added to its loss."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kdlayers._step.handle import KDHandle
from kdlayers._utils.files import replacing

_hf: Any = import_module("transformers")
_Trainer: Any = _hf.Trainer

FILE = "kd.pt"
"""What the handle's state is called in the folder of a checkpoint."""


class KDTrainer(_Trainer):  # pyright: ignore[reportUntypedBaseClass]
    r"""``transformers.Trainer`` with :meth:`KDHandle.loss` added to its loss in training.

    .. math:: L = L_\text{Trainer} + L_\text{KD}

    Trainer's own loss stays as it is, with ``label_smoothing_factor`` and ``compute_loss_func``.
    The teacher runs in Trainer's mixed precision. Train-only parameters become a group of the
    optimiser. Checkpoints hold ``kd.state_dict()`` as ``kd.pt``; resuming takes it back.

    Args:
        args: as of ``transformers.Trainer``.
        kd: the handle of the model; ``None``: a plain Trainer.
        kwargs: as of ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, kd: KDHandle | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kd = kd
        if kd is not None:
            # compute_loss gives a mean over the batch, which Trainer divides as it accumulates.
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        """Trainer's loss and, in training, the distillation; evaluation comes here too."""
        labels = inputs.get("labels")  # Trainer takes them out where it smooths them
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if self.kd is not None and model.training:
            with self.accelerator.autocast():
                loss = loss + self.kd.loss(labels)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The model's parameters in Trainer's groups, the train-only ones in another."""
        made = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        extra = [] if made or self.kd is None else list(self.kd.parameters())
        if extra:
            optimizer.add_param_group({"params": extra})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Beside the model, ``kd.pt``: targets, train-only parameters and the step."""
        super().save_model(output_dir, _internal_call)
        if self.kd is not None and self.args.should_save:
            with replacing(Path(output_dir or self.args.output_dir, FILE)) as file:
                torch.save(self.kd.state_dict(), file)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Trainer's; the handle goes on from the same checkpoint."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = _hf.trainer_utils.get_last_checkpoint(self.args.output_dir)
        if self.kd is not None and isinstance(folder, (str, Path)):
            state = torch.load(Path(folder, FILE), map_location="cpu", weights_only=True)
            self.kd.load_state_dict(state)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
