"""The bytes that the documentation states are those that are written."""

import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.data import TensorDataset
from torchvision import models

from kdlayers import FeatureLoss, FitNetLoss, KDLoss, attach_kd
from tests.benchmark_modules import load
from tests.records.test_training import Net

PAGE = Path(__file__).parents[2] / "docs" / "recorded.md"
ROW = re.compile(r"^\| (.*) \| [\d,]+(?: and \d+ indices)? \| ([\d,]+) \|$", re.M)
TIMES = "\N{MULTIPLICATION SIGN}"


def classes(count):
    teacher, student = Net(8), Net(6)
    for model in (teacher, student):
        model.fc = torch.nn.Linear(model.fc.in_features, count)
    return student, teacher, KDLoss(), 8


def cifar():
    load("_networks")  # puts the folder of the models on the path
    from models.cifar_resnet import make

    nets = (make(name, num_classes=100) for name in ("resnet20", "resnet56"))
    return *nets, FitNetLoss(at="layer3"), 32


def torchvisions(name):
    return models.resnet18(), getattr(models, name)(), FitNetLoss(at="layer4"), 224


def vit():
    nets = (timm.create_model(f"vit_{n}_patch16_224", depth=1) for n in ("tiny", "base"))
    return *nets, FeatureLoss(at="blocks.0"), 224


PAIRS = {
    "logits of 10 classes": (lambda: classes(10), {}),
    "logits of 100 classes": (lambda: classes(100), {}),
    "logits of 1,000 classes": (lambda: classes(1000), {}),
    "logits of 1,000 classes, `topk=20`": (lambda: classes(1000), {"topk": 20}),
    "ResNet-56 on CIFAR, last features, 8 x 8 x 64": (cifar, {}),
    "ResNet-34 `layer4` at 224 pixels, 7 x 7 x 512": (lambda: torchvisions("resnet34"), {}),
    "ResNet-50 `layer4` at 224 pixels, 7 x 7 x 2,048": (lambda: torchvisions("resnet50"), {}),
    "ViT-B/16 tokens at 224 pixels, 14 x 14 x 768": (vit, {}),
}


def stated():
    rows = ROW.findall(PAGE.read_text("utf-8").replace(TIMES, "x"))
    return {name: int(size.replace(",", "")) for name, size in rows}


def test_every_row_is_tested():
    assert stated().keys() == PAIRS.keys()


@pytest.mark.parametrize("name", PAIRS)
def test_a_row_of_the_table(name, tmp_path):
    make, options = PAIRS[name]
    student, teacher, loss, side = make()
    kd = attach_kd(student, teacher, losses=[loss], example=torch.zeros(2, 3, side, side))
    data = TensorDataset(torch.randn(2, 3, side, side), torch.zeros(2, dtype=torch.long))
    kd.record(data, tmp_path / "record", views=1, progress=False, **options)
    files = [f for f in (tmp_path / "record").iterdir() if f.suffix == ".bin"]
    assert sum(file.stat().st_size for file in files) == 2 * stated()[name]
