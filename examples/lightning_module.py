"""letKD in a LightningModule, with the teacher outside it and the targets in the checkpoint."""

from __future__ import annotations

import lightning.pytorch as pl
import torch.nn.functional as F
from _digits import EXAMPLE, SIZES, Parser, accuracy, digits, losses, points, trained_teacher
from _models import make_student
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from kdlayers import KDHandle, attach_kd, save_student


class Distilled(pl.LightningModule):
    """A student that learns from a teacher which is no part of this module."""

    def __init__(self, student: nn.Module, teacher: nn.Module, plain: Dataset, lr: float) -> None:
        super().__init__()
        self.student = student
        self.kd: KDHandle | None = None  # a plain object, which state_dict() passes over
        self.outside = (teacher, plain)  # a tuple: a module that is an attribute would be inside
        self.lr = lr

    def configure_model(self) -> None:
        """Attach: the processes are connected by now, and neither DDP nor optimiser is there."""
        if self.kd is None:  # load_from_checkpoint and every trainer.fit or validate come here
            teacher = self.outside[0]
            self.kd = attach_kd(self.student, teacher, points(), losses=losses(), example=EXAMPLE)

    def configure_optimizers(self) -> optim.Optimizer:
        """The train-only parameters are no part of this module: they are named."""
        parameters = [*self.student.parameters(), *self.kd.parameters()]
        return optim.SGD(parameters, self.lr, momentum=0.9, nesterov=True)

    def on_fit_start(self) -> None:
        """Learn the targets, each process with its part; a resumed run has them already."""
        teacher, plain = self.outside
        teacher.to(self.device)  # Lightning moves only what is a part of this module
        ranks = (self.trainer.world_size, self.trainer.global_rank)
        sampler = DistributedSampler(plain, *ranks, shuffle=False)
        self.kd.fit(DataLoader(plain, 250, sampler=sampler), progress=self.trainer.is_global_zero)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """One more term."""
        x, y = batch
        loss = F.cross_entropy(self.student(x), y) + self.kd.loss(y)
        self.log_dict(self.kd.terms)
        return loss

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Targets, train-only parameters and the step."""
        checkpoint["kd"] = self.kd.state_dict()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """The same back."""
        self.kd.load_state_dict(checkpoint["kd"])


def main() -> None:
    """Train, or go on with training; save what Lightning saves, and the student alone."""
    options = Parser(__doc__, "lightning")
    options.add_argument("--resume", metavar="FILE", help="a checkpoint to go on from")
    options.add_argument("--devices", type=int, default=1, help="processes; default: 1")
    args = options.parse_args()
    images = digits(args.quick)
    teacher = trained_teacher(images, args)
    pl.seed_everything(0, verbose=False)
    module = Distilled(make_student(*SIZES), teacher, images.plain, args.lr)
    loader = DataLoader(images.augmented, args.batch_size, shuffle=True, drop_last=True)
    trainer = pl.Trainer(max_epochs=args.epochs, devices=args.devices, default_root_dir=args.out)
    trainer.fit(module, loader, ckpt_path=args.resume)
    trainer.save_checkpoint(args.out / "last.ckpt")
    if trainer.is_global_zero:
        save_student(module.student, args.out / "student.pt")
        print(f"step {module.kd.step}: {accuracy(module.student, images):.2f} %")


if __name__ == "__main__":
    main()
