"""Puts whole model zoos through attach_kd and writes docs/compatibility.md.

Run ``python -m tests.zoo`` for everything (an hour or two on two cores), or with parts of names
for some models; results are kept in docs/compatibility.json, so that a run can be continued.
``pytest -m zoo`` does the same as a test. zoo_timm.json names the model tried of each timm family.
"""

import copy
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kdlayers import (
    CodebookTargets,
    KDPoint,
    attach_kd,
    bake,
    find_points,
    load_student,
    save_student,
)
from kdlayers._models.trace import trace
from kdlayers.errors import AttachError
from tests.attach_tester import flat, task_loss
from tests.nets import Net

STAGES = ("points", "attach", "train", "copy", "save, load", "bake", "export")
CLASSES = 4
ROOT = Path(__file__).parent.parent
OTHERS = (
    "Models of other libraries were tried by hand, with random weights, and are not in the table:",
    "",
    "- transformers 5: ViT, DeiT, BEiT, Swin, DINOv2 (also with registers), ConvNeXtV2, ResNet,",
    "  CLIP, SigLIP and MobileViT; SegFormer and UperNet; backbone and encoder of DETR, RT-DETR,",
    "  and Mask2Former",
    "- open_clip 3: the towers of images, as students and as teachers",
    "- segmentation_models_pytorch 0.6: Unet, Unet++, MAnet, Linknet, PSPNet, DeepLabV3,",
    "  UPerNet and DPT",
    "- ultralytics 8.4: detectors, segmentation models and classifiers of YOLOv8 and YOLO11",
    "- MONAI 1.6, for images: UNet, DynUNet, SegResNet, DenseNet, ViT, UNETR, SwinUNETR, others",
)
"""What was tried by hand. Most of these libraries are not installed for the tests."""


def torchvision_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Every classification model of torchvision, with the image size it is tried at."""
    from torchvision import models

    def factory(name: str) -> Callable[[], nn.Module]:
        extra = {"image_size": 64} if name.startswith("vit_") else {}
        if name == "vit_h_14":
            extra = {"image_size": 56}
        if name in ("googlenet", "inception_v3"):
            extra["init_weights"] = False
        return lambda: models.get_model(name, weights=None, num_classes=CLASSES, **extra)

    sizes = {"inception_v3": 299, "vit_h_14": 56}
    names = models.list_models(module=models)
    return {n: (factory(n), 224 if "maxvit" in n else sizes.get(n, 64)) for n in names}


def timm_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """A small model of every module of timm, with the image size it is tried at."""
    import timm

    found = {}
    for family, name in json.loads((ROOT / "tests" / "zoo_timm.json").read_text()).items():
        config = timm.get_pretrained_cfg(name)
        size = config.input_size[-1] if config else 224
        make = lambda name=name: timm.create_model(name, num_classes=CLASSES)  # noqa: E731
        found[f"timm {family}: {name}"] = (make, size)
    return found


def segmentation_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Every segmentation model of torchvision; they return maps of scores in a dict."""
    from torchvision import models

    def factory(name: str) -> Callable[[], nn.Module]:
        extra = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        return lambda: models.get_model(name, **extra)

    names = models.list_models(module=models.segmentation)
    return {f"segmentation: {name}": (factory(name), 64) for name in names}


def detection_models() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    """Every detector of torchvision, attached at its backbone, and its parts on their own."""
    from torchvision import models
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    def factory(name: str) -> Callable[[], nn.Module]:
        extra = {"weights": None, "weights_backbone": None, "num_classes": CLASSES}
        if not name.startswith("ssd"):
            extra |= {"min_size": 64, "max_size": 64}
        return lambda: models.get_model(name, **extra)

    sizes = {"ssd300_vgg16": 300, "ssdlite320_mobilenet_v3_large": 320}
    names = models.list_models(module=models.detection)
    found = {f"detection: {name}": (factory(name), sizes.get(name, 64)) for name in names}
    layers = {"layer2": "2", "layer4": "4"}
    resnet = {"backbone_name": "resnet18", "weights": None, "norm_layer": nn.BatchNorm2d}
    mobile = {**resnet, "backbone_name": "mobilenet_v3_large", "fpn": True}
    parts = {
        "IntermediateLayerGetter": lambda: IntermediateLayerGetter(models.resnet18(), layers),
        "resnet_fpn_backbone": lambda: resnet_fpn_backbone(**resnet),
        "mobilenet_backbone": lambda: mobilenet_backbone(**mobile),
    }
    return found | {f"backbone: {name}": (make, 64) for name, make in parts.items()}


class Check:
    """One model, one stage after the other; a stage that fails ends it with its sentence."""

    def __init__(self, make: Callable[[], nn.Module], size: int) -> None:
        torch.manual_seed(0)
        self.make = make
        self.images = torch.randn(4, 3, size, size)
        self.student = self.made()
        self.labels = torch.arange(4) % CLASSES
        self.layout = ""
        self.point = ""

    def made(self) -> nn.Module:
        return self.make()

    def stages(self) -> Iterator[tuple[str, Callable[[], None]]]:
        methods = (
            self.points,
            self.attach,
            self.train,
            self.copied,
            self.saved,
            self.baked,
            self.exported,
        )
        return zip(STAGES, methods, strict=True)

    def points(self) -> None:
        found = find_points(self.student, self.images[:2])
        if not found:
            traced = trace(self.student, (self.images[:2],), "model")
            traced.layout([name for name in traced.names if "block" in name][-1])

    def attach(self) -> None:
        teacher = Net(4, classes=CLASSES)
        # Some heads do not read the last candidate, which attach_kd says; then the one before it.
        for candidate in reversed(find_points(self.student, self.images[:2])):
            self.point, self.layout = candidate.name, candidate.layout
            point = KDPoint(self.point, "last", targets=CodebookTargets(4))
            try:
                self.kd = attach_kd(self.student, teacher, [point], example=self.images[:2])
            except AttachError as error:
                if "does not reach the model's output" not in str(error):
                    raise
            else:
                break
        self.kd.fit([(self.images, self.labels)], progress=False)

    def train(self) -> None:
        self.student.train()
        (self.task_loss() + self.kd.loss()).backward()
        grads = [p.grad for n, p in self.student.named_parameters() if ".kd." in f".{n}"]
        if len(grads) != 6 or any(g is None or not torch.isfinite(g).all() for g in grads):
            raise RuntimeError("a KD parameter got no finite gradient")
        self.student.zero_grad()
        self.kd.detach()
        self.student.eval()
        self.expected = self.run(self.student)

    def task_loss(self) -> Tensor:
        return task_loss(self.student(self.images), self.labels)

    @torch.no_grad()
    def run(self, model: nn.Module) -> Tensor:
        return flat(model(self.images[:2]))

    def same(self, model: nn.Module, tolerance: float = 0.0) -> None:
        difference = (self.run(model) - self.expected).abs().max().item()
        if not difference <= tolerance:
            raise RuntimeError(f"outputs differ by {difference:.2g}")

    def copied(self) -> None:
        self.same(copy.deepcopy(self.student))

    def saved(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_student(self.student, f"{folder}/student.pt")
            self.same(load_student(self.made().eval(), f"{folder}/student.pt"))

    def baked(self) -> None:
        self.same(bake(self.student), 1e-6)

    def exported(self) -> None:
        self.same(torch.export.export(self.student, (self.images[:2],)).module(), 1e-4)


class DetectorCheck(Check):
    """A detector whose backbone is the student; in training the detector is run as a whole."""

    def made(self) -> nn.Module:
        self.detector = self.make()
        return self.detector.backbone

    def task_loss(self) -> Tensor:
        target = {
            "boxes": torch.tensor([[8.0, 8.0, 50.0, 50.0]]),
            "labels": torch.ones(1, dtype=torch.int64),
            "masks": torch.ones(1, *self.images.shape[2:], dtype=torch.uint8),
            "keypoints": torch.tensor([[[20.0, 20.0, 1.0]] * 17]),
        }
        self.detector.train()
        losses = self.detector(list(self.images), [dict(target) for _ in self.images])
        return torch.stack(list(losses.values())).sum()


def check(make: Callable[[], nn.Module], size: int) -> dict[str, object]:
    """Layout, point, seconds, and for every stage "pass" or the reason."""
    start = time.monotonic()
    result: dict[str, object] = dict.fromkeys(STAGES, "-")
    try:
        model = (DetectorCheck if is_detector(make()) else Check)(make, size)
    except Exception as error:
        return {**result, "points": sentence(error), "layout": "", "point": "", "seconds": 0}
    for stage, run in model.stages():
        try:
            run()
            result[stage] = "pass"
        except Exception as error:
            result[stage] = sentence(error)
            if stage in STAGES[:3]:
                break
    seconds = round(time.monotonic() - start, 1)
    return {**result, "layout": model.layout, "point": model.point, "seconds": seconds}


def is_detector(model: nn.Module) -> bool:
    return hasattr(model, "backbone") and hasattr(model, "transform")


def sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:240]


def everything() -> dict[str, tuple[Callable[[], nn.Module], int]]:
    return {
        **torchvision_models(),
        **segmentation_models(),
        **detection_models(),
        **timm_models(),
    }


def write_table(results: dict[str, dict[str, object]]) -> None:
    """docs/compatibility.md out of the results: failures first, then all models."""
    passed = [name for name, r in results.items() if all(r[stage] == "pass" for stage in STAGES)]
    head = ["model", "point", "layout", *STAGES]
    lines = [
        "# Compatibility",
        "",
        "This table shows which models were tested: every classification, segmentation and",
        "detection model of torchvision, and a small model of every timm family. The point is the",
        "last candidate of `find_points`, or an earlier one if the model's head does not read it.",
        "Weights are random, in float32 on a CPU. A detector is attached at its `backbone`, which",
        "is then copied, saved, baked and exported; training runs the whole detector.",
        "`python -m tests.zoo` writes this page.",
        "",
        *OTHERS,
        "",
        f"{len(passed)} of {len(results)} models pass every stage.",
        "",
        "## What fails",
        "",
    ]
    failures = [
        f"- `{name}`, {stage}: {str(r[stage]).replace('|', '/')}"
        for name, r in results.items()
        for stage in STAGES
        if r[stage] not in ("pass", "-")
    ]
    lines += [*(failures or ["Nothing."]), "", "## All models", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, r in results.items():
        cells = [name, f"`{r['point']}`" if r["point"] else "", str(r["layout"])]
        marks = {"pass": "pass", "-": "-"}
        cells += [marks.get(str(r[stage]), "fails") for stage in STAGES]
        lines.append("| " + " | ".join(cells) + " |")
    (ROOT / "docs" / "compatibility.md").write_text("\n".join(lines) + "\n")


def main(wanted: list[str], store: Path) -> None:
    """Check what is wanted and not yet in ``store``, then write the table."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1 if "--one-thread" in wanted else 2)
    wanted = [name for name in wanted if not name.startswith("--")]
    results = json.loads(store.read_text()) if store.exists() else {}
    for name, (make, size) in everything().items():
        if (not wanted and name not in results) or any(w in name for w in wanted):
            results[name] = check(make, size)
            store.write_text(json.dumps(results, indent=1))
            write_table(results)
            bad = {k: v for k, v in results[name].items() if k in STAGES and v != "pass"}
            print(name, results[name]["seconds"], bad or "pass", flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:], ROOT / "docs" / "compatibility.json")
