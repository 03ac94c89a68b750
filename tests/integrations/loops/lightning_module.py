"""A module and a trainer as in Lightning's own examples of image classifiers."""

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
import torchvision


class ImageClassifier(pl.LightningModule):
    def __init__(self, num_classes):
        super().__init__()
        self.save_hyperparameters()
        self.model = torchvision.models.get_model("resnet18", num_classes=num_classes)

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_acc", (self.model(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


def main(args):
    module = ImageClassifier(num_classes=3)
    train_loader, val_loader = args.train_loader, args.val_loader
    callbacks = args.callbacks
    trainer = pl.Trainer(callbacks=callbacks, **args.options)
    trainer.fit(module, train_loader, val_loader, ckpt_path=args.resume)
    return module, trainer
