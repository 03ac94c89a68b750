"""letKD with Hugging Face's Trainer: a small ResNet of transformers learns from a larger one.

python examples/frameworks/hf_trainer.py --quick
python examples/frameworks/hf_trainer.py --quick --resume runs/hf_trainer-quick/checkpoint-8
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch
import transformers as hf
from torch.utils.data import DataLoader, default_collate

from kdlayers import AEKTLoss, CodebookTargets, DecisionTargets, KDPoint, attach_kd, save_student
from kdlayers.integrations.transformers import KDTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))
import data

SETTINGS = {"learning_rate": 3e-3, "per_device_train_batch_size": 50}
SETTINGS |= {"report_to": "none", "save_strategy": "epoch"}


def main() -> None:
    """Train, or resume training."""
    options = data.options(__doc__)
    options.add_argument("--resume", metavar="DIR", help="checkpoint folder to resume from")
    args = options.parse_args()
    images, file = data.load(args), args.out / "teacher.pt"
    training = hf.TrainingArguments(args.out, num_train_epochs=args.epochs, **SETTINGS)
    teacher = resnet([32, 64, 128], [1, 2, 2], len(images.classes)).to(training.device)
    if file.exists():
        teacher.load_state_dict(torch.load(file, weights_only=True))
    else:
        quiet = replace(training, num_train_epochs=4, save_strategy="no")
        KDTrainer(teacher, quiet, collate, images.augmented).train()
        torch.save(teacher.state_dict(), file)

    student = resnet([16, 32, 64], [1, 1, 2], len(images.classes))
    last = "resnet.encoder.stages.2"
    first = KDPoint(f"{last}.layers.0", targets=DecisionTargets(subclasses=2))
    points = [first, KDPoint(last, targets=CodebookTargets(32))]
    losses = [AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)]  # has its own parameters
    # Attach after TrainingArguments, which connects the processes, and before Trainer.
    kd = attach_kd(student, teacher, points, losses=losses, example=images.example)
    if args.resume:
        kd.load_state_dict(torch.load(Path(args.resume, "kd.pt"), weights_only=True))
    kd.fit(DataLoader(images.plain, 50))  # does nothing after load_state_dict
    trainer = KDTrainer(student, training, collate, images.augmented, kd=kd)
    trainer.train(resume_from_checkpoint=args.resume)
    if trainer.is_world_process_zero():
        save_student(student, args.out / "student.pt")


def resnet(widths: list[int], depths: list[int], classes: int) -> hf.PreTrainedModel:
    """A ResNet of transformers for small images."""
    sizes = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": depths}
    config = hf.ResNetConfig(**sizes, layer_type="basic", num_labels=classes)
    return hf.ResNetForImageClassification(config)


def collate(pairs: list) -> dict[str, torch.Tensor]:
    """Collate pairs into the dict that Trainer expects."""
    return dict(zip(("pixel_values", "labels"), default_collate(pairs), strict=True))


if __name__ == "__main__":
    main()
