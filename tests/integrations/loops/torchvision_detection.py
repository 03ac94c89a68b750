"""The order of calls of torchvision's references/detection: train.py and engine.py in one file."""

import torch
import torch.utils.data
import torchvision

LOSSES = []


def train_one_epoch(model, optimizer, data_loader, device, epoch, print_freq, scaler=None):
    model.train()
    for images, targets in data_loader:
        images = list(image.to(device) for image in images)
        targets = [{k: v.to(device) for k, v in t.items()} for t in targets]
        with torch.autocast("cpu", enabled=scaler is not None):
            loss_dict = model(images, targets)
            losses = sum(loss for loss in loss_dict.values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
        LOSSES.append(losses.item())


def main(args):
    device = torch.device("cpu")
    data_loader = args.data_loader
    model = torchvision.models.get_model(
        args.model, weights=None, weights_backbone=None, num_classes=args.num_classes, **args.kwargs
    )
    model.to(device)
    model_without_ddp = model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9)
    lr_scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[1], gamma=0.1)
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model_without_ddp.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        args.start_epoch = checkpoint["epoch"] + 1
    print("Start training")
    LOSSES.clear()
    for epoch in range(args.start_epoch, args.epochs):
        torch.manual_seed(epoch)
        train_one_epoch(model, optimizer, data_loader, device, epoch, args.print_freq)
        lr_scheduler.step()
        checkpoint = {
            "model": model_without_ddp.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "epoch": epoch,
        }
        torch.save(checkpoint, args.output)
        with torch.inference_mode():
            model.eval()(list(next(iter(data_loader))[0]))
    return model, list(LOSSES)
