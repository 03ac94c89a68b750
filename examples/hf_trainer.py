"""letKD with Hugging Face's Trainer: a ResNet of transformers learns from a RegNet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from _digits import EXAMPLE, Parser, accuracy, collate, digits, losses, points, trained_teacher
from torch.utils.data import DataLoader

from kdlayers import KDHandle, attach_kd, save_student

SIZES = {"num_channels": 1, "num_labels": 10, "embedding_size": 16, "hidden_sizes": [32, 64]}
CONFIG = hf.ResNetConfig(depths=[1, 2], layer_type="basic", **SIZES)


class KDTrainer(hf.Trainer):
    """A Trainer with one more term in its loss, and the handle's state in its checkpoints."""

    def __init__(self, *args: Any, kd: KDHandle, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kd = kd
        # compute_loss gives a mean over the batch: Trainer shall divide it when it accumulates.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, **options: Any
    ) -> Any:
        """Trainer's loss and, in training, the distillation; evaluation comes here too."""
        labels = inputs["labels"]  # Trainer takes them out of the inputs where it smooths them
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        if model.training:
            loss = loss + self.kd.loss(labels)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        """The student's parameters in Trainer's groups, and the train-only ones in a group more."""
        if self.optimizer is None:
            super().create_optimizer(*args)
            self.optimizer.add_param_group({"params": list(self.kd.parameters())})
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Beside the student, ``kd.pt``: targets, train-only parameters and the step."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            torch.save(self.kd.state_dict(), Path(output_dir or self.args.output_dir, "kd.pt"))


def main() -> None:
    """Train, or go on with training."""
    options = Parser(__doc__, "hf_trainer")
    options.add_argument("--resume", metavar="DIR", help="a checkpoint's folder to go on from")
    args = options.parse_args()
    sizes = {"num_train_epochs": args.epochs, "per_device_train_batch_size": args.batch_size}
    rest = {"save_strategy": "epoch", "report_to": "none", "disable_tqdm": True}
    training = hf.TrainingArguments(args.out, learning_rate=3e-3, **sizes, **rest)
    images = digits(args.quick)
    with training.main_process_first():
        teacher = trained_teacher(images, args).to(training.device)
    student = hf.ResNetForImageClassification(CONFIG)
    at = points("resnet.encoder.stages.1.layers.0", "resnet.encoder.stages.1")
    # After TrainingArguments, which connect the processes; before Trainer.
    kd = attach_kd(student, teacher, at, losses=losses(), example=EXAMPLE)
    if args.resume:
        kd.load_state_dict(torch.load(Path(args.resume, "kd.pt"), weights_only=True))
    kd.fit(DataLoader(images.plain, 250))  # nothing is left to fit after load_state_dict
    trainer = KDTrainer(student, training, collate, images.augmented, kd=kd)
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        save_student(student, args.out / "student.pt")
        print(f"step {kd.step}: {accuracy(student, images):.2f} %")


if __name__ == "__main__":
    main()
