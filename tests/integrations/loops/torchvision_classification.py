"""The order of calls of torchvision's references/classification/train.py, on random images."""

import torch
import torch.utils.data
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

LOSSES = []


def train_one_epoch(
    model, criterion, optimizer, data_loader, device, epoch, args, model_ema=None, scaler=None
):
    model.train()
    for i, (image, target) in enumerate(data_loader):
        image, target = image.to(device), target.to(device)
        with torch.autocast("cpu", enabled=args.amp):
            output = model(image)
            loss = criterion(output, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad_norm)
        optimizer.step()
        if model_ema and i % args.model_ema_steps == 0:
            model_ema.update_parameters(model)
        LOSSES.append(loss.item())


def evaluate(model, criterion, data_loader):
    model.eval()
    with torch.inference_mode():
        return sum(criterion(model(image), target).item() for image, target in data_loader)


def main(args):
    device = torch.device("cpu")
    train_dir = args.train_dir
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    normalize = v2.Normalize([0.5] * 3, [0.25] * 3)
    augmented = v2.Compose([v2.RandomResizedCrop(32), *to_tensor, normalize])
    plain = v2.Compose([v2.Resize(32), *to_tensor, normalize])
    dataset = torchvision.datasets.ImageFolder(train_dir, augmented)
    dataset_test = torchvision.datasets.ImageFolder(train_dir, plain)
    num_classes = len(dataset.classes)
    mixupcutmix = v2.RandomChoice(
        [v2.MixUp(num_classes=num_classes), v2.CutMix(num_classes=num_classes)]
    )

    def collate_fn(batch):
        return mixupcutmix(*torch.utils.data.default_collate(batch))

    data_loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, shuffle=True, collate_fn=collate_fn
    )
    data_loader_test = torch.utils.data.DataLoader(dataset_test, batch_size=4)
    model = torchvision.models.get_model(args.model, weights=args.weights, num_classes=num_classes)
    model.to(device)
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)
    parameters = norms_apart(model, args)
    optimizer = torch.optim.SGD(parameters, lr=args.lr, momentum=0.9)
    lr_scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    model_ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        lr_scheduler.load_state_dict(checkpoint["lr_scheduler"])
        args.start_epoch = checkpoint["epoch"] + 1
        if model_ema:
            model_ema.load_state_dict(checkpoint["model_ema"])
    scaler = None
    LOSSES.clear()
    for epoch in range(args.start_epoch, args.epochs):
        torch.manual_seed(epoch)
        train_one_epoch(model, criterion, optimizer, data_loader, device, epoch, args, model_ema, scaler)
        lr_scheduler.step()
        evaluate(model, criterion, data_loader_test)
        evaluate(model_ema, criterion, data_loader_test)
        checkpoint = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "lr_scheduler": lr_scheduler.state_dict(),
            "epoch": epoch,
        }
        if model_ema:
            checkpoint["model_ema"] = model_ema.state_dict()
        torch.save(checkpoint, args.output)
    return model, model_ema, list(LOSSES)


def norms_apart(model, args):
    """Two groups, as the references' set_weight_decay makes them: norms have their own decay."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
    ids = {id(p) for m in norms for p in m.parameters()}
    every = list(model.parameters())
    groups = [p for p in every if id(p) not in ids], [p for p in every if id(p) in ids]
    decays = args.weight_decay, args.norm_weight_decay
    return [{"params": p, "weight_decay": d} for p, d in zip(groups, decays, strict=True)]
