"""Hugging Face's Trainer with a distillation loss added to its own."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kdlayers._step.handle import KDHandle
from kdlayers._utils.files import replacing

_hf: Any = import_module("transformers")
_Trainer: Any = _hf.Trainer

_CONVERSIONS = "_weight_conversions"
"""Attribute with the renamings that ``save_pretrained`` reverts, since transformers 5."""
FILE = "kd.pt"
"""File name of the handle's state in the folder of a checkpoint."""


@contextmanager
def _names_of(model: Any) -> Generator[None, None, None]:
    """Let ``save_pretrained`` keep the model's own names, not those of the published weights."""
    own = vars(model)
    missing = _CONVERSIONS not in own
    before, own[_CONVERSIONS] = own.get(_CONVERSIONS), []
    try:
        yield
    finally:
        own[_CONVERSIONS] = before
        if missing:
            del own[_CONVERSIONS]


class KDTrainer(_Trainer):  # pyright: ignore[reportUntypedBaseClass]
    r"""``transformers.Trainer`` with :meth:`KDHandle.loss` added to its loss in training.

    .. math:: L = L_\text{Trainer} + L_\text{KD}

    Trainer's own loss does not change, including ``label_smoothing_factor`` and
    ``compute_loss_func``. The teacher runs in Trainer's mixed precision. Train-only parameters
    become a group of the optimiser. The training logs get the entries of ``kd.terms``, with the
    prefix ``kd_``. Checkpoints hold ``kd.state_dict()`` as ``kd.pt``; resuming loads it.

    Args:
        args: arguments of ``transformers.Trainer``.
        kd: the handle of the model; ``None``: a plain Trainer.
        kwargs: arguments of ``transformers.Trainer``.
    """

    def __init__(self, *args: Any, kd: KDHandle | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kd = kd
        if kd is not None:
            # compute_loss returns a mean over the batch; Trainer divides it when it accumulates.
            self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        """Trainer's loss, plus the distillation loss in training; evaluation calls this too."""
        labels = inputs.get("labels")  # Trainer removes them if it smooths them
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if self.kd is not None and model.training:
            with self.accelerator.autocast():
                loss = loss + self.kd.loss(labels) / self._batches_summed()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log what Trainer logs, with the terms of the last step, as ``kd_total`` and so on."""
        if self.kd is not None and "loss" in logs:  # evaluation logs eval_loss
            terms = {f"kd_{name}": float(value) for name, value in self.kd.terms.items()}
            logs = {**logs, **terms}
        super().log(logs, *args, **kwargs)

    def _batches_summed(self) -> int:
        """Number of batches whose losses Trainer adds up in a step without dividing them."""
        scaled = getattr(self, "loss_is_scaled_for_ga", None)
        if scaled is None:  # Trainer expects compute_loss_func to divide by all items of the step
            scaled = self.compute_loss_func is not None
        given = self.args.gradient_accumulation_steps
        return int(getattr(self, "current_gradient_accumulation_steps", given)) if scaled else 1

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Create Trainer's optimiser, with another group for the train-only parameters."""
        made = self.optimizer is not None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        extra = [] if made or self.kd is None else list(self.kd.parameters())
        if extra:
            # Without the entry, the group would have the decay that is the optimiser's own default.
            optimizer.add_param_group({"params": extra, "weight_decay": self.args.weight_decay})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and next to it ``kd.pt``: targets, train-only parameters and the step."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        # Trainer loads its checkpoints with load_state_dict, which skips names that do not exist.
        # It writes them with both arguments, and those for the hub without a folder.
        checkpoint = _internal_call and output_dir is not None
        with _names_of(model) if checkpoint else nullcontext():
            super().save_model(output_dir, _internal_call)
        if self.kd is not None and self.args.should_save:
            with replacing(Path(output_dir or self.args.output_dir, FILE)) as file:
                torch.save(self.kd.state_dict(), file)

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Call Trainer's method, and resume the handle from the same checkpoint."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = _hf.trainer_utils.get_last_checkpoint(self.args.output_dir)
        if self.kd is not None and isinstance(folder, (str, Path)):
            state = torch.load(Path(folder, FILE), map_location="cpu", weights_only=True)
            self.kd.load_state_dict(state)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
