"""torchvision's reference scripts with the lines of their page, resumed and averaged."""

import argparse

import pytest
import torch
import torchvision
from PIL import Image
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation.fcn import FCN, FCNHead

from kdlayers import KDPoint, attach_kd, load_student, save_student
from tests.docs_blocks import small_codebooks
from tests.integrations.pages import diffs, loop

DIFFS = diffs("torchvision.md")
SMALL = {
    "resnet50": "resnet18",
    "fasterrcnn_resnet50_fpn_v2": "fasterrcnn_mobilenet_v3_large_320_fpn",
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Small teachers without weights from the network; a codebook for a handful of images."""
    small_codebooks(monkeypatch, 4)
    get = torchvision.models.get_model

    def get_model(name, weights=None, **options):
        if weights == "DEFAULT":
            options = TEACHER[name]
        if name in ("fcn", "deeplabv3_resnet101"):
            return segmenter(options["num_classes"])
        return get(SMALL.get(name, name), weights=None, **options)

    monkeypatch.setattr(torchvision.models, "get_model", get_model)


def segmenter(classes):
    """The references' kind of model, as small as it can be."""
    layers = {"layer3": "aux", "layer4": "out"}
    backbone = IntermediateLayerGetter(torchvision.models.resnet18(), layers)
    return FCN(backbone, FCNHead(512, classes), FCNHead(256, classes))


PLAIN = {"weights_backbone": None}
BOXES = {"min_size": 64, "max_size": 64, "rpn_pre_nms_top_n_train": 20}
TEACHER = {
    "resnet50": {"num_classes": 3},
    "deeplabv3_resnet101": {**PLAIN, "num_classes": 4},
    "fasterrcnn_resnet50_fpn_v2": {**PLAIN, "num_classes": 3, **BOXES},
}


def namespace(tmp_path, **options):
    shared = {"epochs": 1, "start_epoch": 0, "resume": "", "lr": 0.01, "amp": False, "workers": 0}
    shared |= {"output": str(tmp_path / "checkpoint.pth"), "print_freq": 1, "batch_size": 4}
    return argparse.Namespace(**{**shared, **options})


def classification(tmp_path, **options):
    for index in range(8):
        folder = tmp_path / "train" / str(index % 3)
        folder.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (40, 40, 3), dtype=torch.uint8)
        if not (folder / f"{index}.png").exists():
            Image.fromarray(noise.numpy()).save(folder / f"{index}.png")
    shared = {"model": "resnet18", "weights": None, "train_dir": str(tmp_path / "train")}
    shared |= {"label_smoothing": 0.1, "weight_decay": 1e-4, "norm_weight_decay": 0.0}
    shared |= {"clip_grad_norm": 1.0, "model_ema_steps": 1}
    return namespace(tmp_path, **{**shared, **options})


def segmentation(tmp_path, **options):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 48, 48, generator=generator)
    masks = torch.randint(4, (4, 48, 48), generator=generator)
    masks[:, :8] = 255
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, masks), 2)
    shared = {"model": "fcn", "num_classes": 4, "data_loader": loader}
    return namespace(tmp_path, **{**shared, **options})


def detection(tmp_path, **options):
    generator = torch.Generator().manual_seed(0)
    data = []
    for height in (64, 48, 56, 64):
        boxes = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([2])}
        data.append((torch.rand(3, height, 64, generator=generator), boxes))
    collate = lambda batch: tuple(zip(*batch, strict=True))  # noqa: E731
    loader = torch.utils.data.DataLoader(data, 2, collate_fn=collate)
    shared = {"model": "fasterrcnn_mobilenet_v3_large_320_fpn", "num_classes": 3, "kwargs": BOXES}
    return namespace(tmp_path, **{**shared, "data_loader": loader, **options})


def run(name, args):
    torch.manual_seed(0)
    diff = DIFFS[f"torchvision_{name}"]
    if name == "detection":  # the small detector has other names
        diff = diff.replace("body.layer4", "body.13")
    return loop(f"torchvision_{name}", diff)(args)


SCRIPTS = {"classification": classification, "segmentation": segmentation, "detection": detection}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resumed_run_goes_on_exactly(name, tmp_path):
    make = SCRIPTS[name]
    whole, *_, losses = run(name, make(tmp_path, epochs=2))
    run(name, make(tmp_path, epochs=1))
    first = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    checkpoint = str(tmp_path / "checkpoint.pth")
    resumed, *_, rest = run(name, make(tmp_path, epochs=2, resume=checkpoint))
    assert rest == losses[len(losses) // 2 :]
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    layer = [key for key in ours if ".kd." in key]
    assert len(layer) >= 6
    moved = [key for key in layer if not torch.equal(first["model"][key], ours[key])]
    assert any(key.endswith("value.scale") or "norm" in key for key in moved)


def test_classification_with_amp_and_its_averaged_student(tmp_path):
    _, model_ema, _ = run("classification", classification(tmp_path, amp=True))
    save_student(model_ema, tmp_path / "student.pt")
    fresh = torchvision.models.get_model("resnet18", num_classes=3)
    student = load_student(fresh, tmp_path / "student.pt").eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(student(images), model_ema.eval()(images))


def test_the_checkpoints_averaged_weights_become_a_student(tmp_path):
    _, model_ema, _ = run("classification", classification(tmp_path))
    student = torchvision.models.get_model("resnet18", num_classes=3)
    attach_kd(student, at=[KDPoint("layer4", num_templates=4)]).detach()
    averaged = torch.optim.swa_utils.AveragedModel(student, use_buffers=True)
    averaged.load_state_dict(
        torch.load(tmp_path / "checkpoint.pth", weights_only=True)["model_ema"]
    )
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(averaged.eval()(images), model_ema.eval()(images))
