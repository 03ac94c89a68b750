"""The order of calls of torchvision's references/segmentation/train.py, on random images."""

import torch
import torch.utils.data
import torchvision
from torch import nn

LOSSES = []


def criterion(inputs, target):
    losses = {
        k: nn.functional.cross_entropy(v, target, ignore_index=255) for k, v in inputs.items()
    }
    return losses["out"] if len(losses) == 1 else losses["out"] + 0.5 * losses["aux"]


def train_one_epoch(model, criterion, optimizer, data_loader, lr_scheduler, device, epoch, args):
    model.train()
    for image, target in data_loader:
        image, target = image.to(device), target.to(device)
        with torch.autocast("cpu", enabled=args.amp):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        LOSSES.append(loss.item())


def main(args):
    device = torch.device("cpu")
    num_classes = args.num_classes
    data_loader = args.data_loader
    model = torchvision.models.get_model(
        args.model, weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=True
    )
    model.to(device)
    model_without_ddp = model
    params_to_optimize = [
        {"params": [p for p in model_without_ddp.backbone.parameters() if p.requires_grad]},
        {"params": [p for p in model_without_ddp.classifier.parameters() if p.requires_grad]},
        {"params": list(model_without_ddp.aux_classifier.parameters()), "lr": args.lr * 10},
    ]
    optimizer = torch.optim.SGD(params_to_optimize, lr=args.lr, momentum=0.9)
    lr_scheduler = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=0.9)
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        args.start_epoch = checkpoint["epoch"] + 1
    LOSSES.clear()
    for epoch in range(args.start_epoch, args.epochs):
        torch.manual_seed(epoch)
        train_one_epoch(model, criterion, optimizer, data_loader, lr_scheduler, device, epoch, args)
        with torch.inference_mode():
            model.eval()(next(iter(data_loader))[0])
        checkpoint = {
            "model": model_without_ddp.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "epoch": epoch,
        }
        torch.save(checkpoint, args.output)
    return model, list(LOSSES)
