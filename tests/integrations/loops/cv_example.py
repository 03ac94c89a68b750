"""The order of calls of accelerate's cv_example.py: a frozen base, dicts, images normalised late."""

import torch
from accelerate import Accelerator
from timm import create_model
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset


class PetsDataset(Dataset):
    def __init__(self, file_names, image_transform=None, label_to_id=None):
        self.file_names = file_names
        self.image_transform = image_transform
        self.label_to_id = label_to_id

    def __len__(self):
        return len(self.file_names)

    def __getitem__(self, idx):
        name = self.file_names[idx]
        image = torch.rand(3, 72, 72, generator=torch.Generator().manual_seed(name))
        return {"image": self.image_transform(image), "label": self.label_to_id[name % 3]}


def main(args):
    return training_function({"lr": 1e-2, "num_epochs": 2, "batch_size": 4}, args)


def training_function(config, args):
    accelerator = Accelerator(cpu=args.cpu, mixed_precision=args.mixed_precision)
    lr, num_epochs, batch_size = config["lr"], config["num_epochs"], config["batch_size"]
    file_names = list(range(12))
    label_to_id = {0: 0, 1: 1, 2: 2}
    train_split = list(range(8))
    train_tfm = lambda image: image[:, :64, :64].flip(-1)  # noqa: E731
    eval_tfm = lambda image: image[:, :64, :64]  # noqa: E731
    train_dataset = PetsDataset([file_names[i] for i in train_split], train_tfm, label_to_id)
    train_dataloader = DataLoader(train_dataset, shuffle=True, batch_size=batch_size)
    model = create_model("resnet50d", pretrained=True, num_classes=len(label_to_id))
    model = model.to(accelerator.device)
    for param in model.parameters():
        param.requires_grad = False
    for param in model.get_classifier().parameters():
        param.requires_grad = True
    mean = torch.tensor(model.default_cfg["mean"])[None, :, None, None].to(accelerator.device)
    std = torch.tensor(model.default_cfg["std"])[None, :, None, None].to(accelerator.device)
    optimizer = torch.optim.Adam(params=model.parameters(), lr=lr / 25)
    lr_scheduler = OneCycleLR(optimizer=optimizer, max_lr=lr, epochs=num_epochs, steps_per_epoch=2)
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    for epoch in range(num_epochs):
        model.train()
        for step, batch in enumerate(train_dataloader):
            batch = {k: v.to(accelerator.device) for k, v in batch.items()}
            inputs = (batch["image"] - mean) / std
            outputs = model(inputs)
            loss = torch.nn.functional.cross_entropy(outputs, batch["label"])
            accelerator.backward(loss)
            optimizer.step()
            lr_scheduler.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            model(inputs)
    return accelerator.unwrap_model(model), locals()
