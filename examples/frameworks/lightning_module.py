"""letKD in a LightningModule, with the teacher outside it and the targets in the checkpoint.

python examples/frameworks/lightning_module.py [--resume runs/lightning_module/last.ckpt]
"""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import AEKTLoss, CodebookTargets, DecisionTargets, KDPoint, attach_kd, save_student

sys.path.insert(0, str(Path(__file__).parents[1]))
import data


class Distilled(pl.LightningModule):
    """A student that learns from a teacher. The teacher is not a submodule."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, images: data.Images) -> None:
        super().__init__()
        self.student = student
        self.kd = None  # the handle is not a module, so state_dict() leaves it out
        self.outside = lambda: (teacher, images)  # neither a submodule nor copied by averaging

    def configure_model(self) -> None:
        """Attach here: the processes are connected, and DDP and the optimiser do not exist yet."""
        teacher, images = self.outside()
        if teacher is None or self.kd is not None:  # called by every fit and validate
            return
        first = KDPoint("trunk_output.block3.block3-0", targets=DecisionTargets(subclasses=2))
        points = [first, KDPoint("trunk_output.block3", targets=CodebookTargets(32))]
        losses = [AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)]
        self.kd = attach_kd(self.student, teacher, points, losses=losses, example=images.example)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Add the train-only parameters, such as AEKT's, which are not part of this module."""
        parameters = [*self.student.parameters(), *(self.kd.parameters() if self.kd else [])]
        return torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True)

    def on_fit_start(self) -> None:
        """Fit the targets, each process on its shard. A resumed run has fitted targets already."""
        teacher, images = self.outside()
        if self.kd is not None:
            teacher.to(self.device)  # Lightning moves submodules only
            shard = range(self.trainer.global_rank, len(images.plain), self.trainer.world_size)
            self.kd.fit(DataLoader(images.plain, 50, sampler=shard))

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The usual loss, plus the distillation loss."""
        x, y = batch
        loss = F.cross_entropy(self.student(x), y)
        return loss if self.kd is None else loss + self.kd.loss(y)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Save the targets, the train-only parameters and the step."""
        checkpoint["kd"] = self.kd.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restore what on_save_checkpoint has saved."""
        self.kd.load_state_dict(checkpoint["kd"])


def main() -> None:
    """Train or resume; save Lightning's checkpoint, and the student in a file of its own."""
    options = data.options(__doc__)
    options.add_argument("--resume", metavar="FILE", help="checkpoint to resume from")
    args = options.parse_args()
    images, file = data.load(args), args.out / "teacher.pt"
    loader = DataLoader(images.augmented, 50, shuffle=True, drop_last=True)
    pl.seed_everything(0, verbose=False)
    teacher = regnet([1, 2, 2], [32, 64, 128], len(images.classes))
    if not file.exists():
        trainer = pl.Trainer(max_epochs=4, logger=False, enable_checkpointing=False)
        trainer.fit(Distilled(teacher, None, images), loader)
        torch.save(teacher.state_dict(), file)
    teacher.load_state_dict(torch.load(file, weights_only=True))
    module = Distilled(regnet([1, 1, 2], [16, 32, 64], len(images.classes)), teacher, images)
    trainer = pl.Trainer(max_epochs=args.epochs, default_root_dir=args.out)
    trainer.fit(module, loader, ckpt_path=args.resume)
    trainer.save_checkpoint(args.out / "last.ckpt")
    if trainer.is_global_zero:
        save_student(module.student, args.out / "student.pt")


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0])


if __name__ == "__main__":
    main()
