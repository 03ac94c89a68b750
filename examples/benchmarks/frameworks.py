"""The cost of kdlayers in a training step of a framework's loop.

For each script, the benchmark runs the step as the script does, with the script's features switched
on. It runs the same step with the lines that the docs add: with ``KDLoss``, and with ``KDLoss`` and
letKD-1. If the framework has distillation of its own, that step is measured too. The steps take
turns in one process. Ratios are computed within each round; the table shows their median and
quartiles. Every distilled step includes the teacher's forward. On the CPU, times are those of this
process (``time.process_time``), so that other processes disturb them less.
"""

from __future__ import annotations

import copy
import os
import tempfile
import time
from collections.abc import Callable

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import timm
import torch
import torch.nn.functional as F
import torchvision
from _tables import Report, Table, command_line, read, settings
from _timing import Step, alternate, ratio, spread
from torch import nn

from kdlayers import CodebookTargets, KDHandle, KDLoss, KDPoint, attach_kd
from kdlayers.integrations.timm import KDTask

CLASSES, BATCH, TEMPLATES = 10, 4, 8
ALONE, LOGITS, LETKD, OWN = "as it is", "KDLoss", "KDLoss, letKD-1", "its own distillation"


def main() -> None:
    """Measure every script."""
    parser = command_line(__doc__, rounds=10)
    parser.add_argument("--only", choices=SCRIPTS, help="one script; default: all")
    args = read(parser)
    report = Report("frameworks", "A step of a framework's loop", settings(args))
    rows = []
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    for name in [args.only] if args.only else SCRIPTS:
        steps = SCRIPTS[name](args)
        times = alternate(steps, args.rounds, device=args.device, clock=clock, least=0.0)
        report.times_ms[name] = times
        for variant in steps:
            against = ["1" if variant == ALONE else compare(report, name, variant, ALONE, times)]
            theirs = OWN in steps and variant == LOGITS
            against.append(compare(report, name, variant, OWN, times) if theirs else "")
            shown = name if variant == ALONE else ""
            rows.append([shown, variant, str(spread(times[variant])), *against])
        print(f"{name}: {rows[-1]}", flush=True)
    columns = ("script", "step", "ms", "of the script's step", "of its own distillation")
    report.add(Table("A step of a framework's loop", columns, rows))
    report.save(args.out)


def compare(report: Report, name: str, ours: str, theirs: str, times: dict) -> str:
    """Store a ratio and return it as text."""
    return report.compare(name, "time", ours, theirs, ratio(times[ours], times[theirs]))


def pair(args, size: int) -> tuple[nn.Module, nn.Module, torch.Tensor, torch.Tensor]:
    """A student, a teacher, and a batch."""
    models = torchvision.models
    student, teacher = (make(num_classes=CLASSES) for make in (models.resnet18, models.resnet34))
    images = torch.randn(BATCH, 3, size, size, device=args.device)
    labels = torch.randint(CLASSES, (BATCH,), device=args.device)
    return student.to(args.device), teacher.to(args.device).eval(), images, labels


def variants(
    student: nn.Module,
    teacher: nn.Module,
    images: torch.Tensor | list[torch.Tensor],
    make: Callable,
    at: str = "layer4",
    losses: bool = True,
) -> dict[str, Step]:
    """The step without distillation, with one loss and with two, each with its own student."""
    steps = {ALONE: make(copy.deepcopy(student), None)}
    logits = [KDLoss()] if losses else []
    if losses:
        own = copy.deepcopy(student)
        steps[LOGITS] = make(own, attach_kd(own, teacher, losses=logits, example=images))
    own = copy.deepcopy(student)
    points = [KDPoint(at, targets=CodebookTargets(TEMPLATES))]
    kd = attach_kd(own, teacher, points, losses=[KDLoss()] if losses else [], example=images)
    kd.fit([images if isinstance(images, torch.Tensor) else (images, None)] * 2, progress=False)
    steps[LETKD if losses else "letKD-1"] = make(own, kd)
    return steps


def timm_train(args) -> dict[str, Step]:
    """Timm's train.py: mixed labels, EMA, clipping; compared with LogitDistillationTask."""
    from timm.task import ClassificationTask, LogitDistillationTask

    size = 32 if args.quick else 64
    make_model = lambda name: timm.create_model(name, num_classes=CLASSES).to(args.device)  # noqa: E731
    student, teacher = make_model("resnet18"), make_model("resnet34").eval()
    images = torch.randn(BATCH, 3, size, size, device=args.device)
    target = F.one_hot(torch.randint(CLASSES, (BATCH,)), CLASSES).float().to(args.device)
    target = 0.7 * target + 0.3 * target.flip(0)
    criterion = {"criterion_kwargs": {"soft_targets": True}, "verbose": False}

    def step_of(task) -> Step:
        optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), 1e-4, momentum=0.9)
        task.setup_ema(decay=0.99)
        task.train()

        def step() -> None:
            task(images, target)["loss"].backward()
            timm.utils.dispatch_clip_grad(task.get_clip_parameters(), value=1.0, mode="norm")
            optimizer.step()
            optimizer.zero_grad()
            task.update_ema()

        return step

    def make(model, kd) -> Step:
        task = ClassificationTask(model, **criterion).to(args.device)
        return step_of(task if kd is None else KDTask(task, kd))

    steps = variants(student, teacher, images, make)
    own = LogitDistillationTask(copy.deepcopy(student), teacher, **criterion).to(args.device)
    return steps | {OWN: step_of(own)}


def classification(args) -> dict[str, Step]:
    """Torchvision's reference script: smoothed labels, clipping, EMA."""
    student, teacher, images, labels = pair(args, 32 if args.quick else 64)

    def make(model, kd) -> Step:
        criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        criterion = criterion if kd is None else kd.criterion(criterion)
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
        ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
        model.train()

        def step() -> None:
            loss = criterion(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update_parameters(model)

        return step

    return variants(student, teacher, images, make)


def segmentation(args) -> dict[str, Step]:
    """Torchvision's reference script: masks with ignored pixels, an auxiliary head."""
    size = 32 if args.quick else 64
    options = {"weights": None, "weights_backbone": None, "num_classes": 5}
    models = torchvision.models.segmentation
    student = models.deeplabv3_mobilenet_v3_large(**options, aux_loss=True).to(args.device)
    teacher = models.deeplabv3_mobilenet_v3_large(**options).to(args.device).eval()
    images = torch.randn(2, 3, size, size, device=args.device)
    masks = torch.randint(5, (2, size, size), device=args.device)
    masks[:, :4] = 255

    def own_loss(outputs, target) -> torch.Tensor:
        found = [F.cross_entropy(v, target, ignore_index=255) for v in outputs.values()]
        return found[0] + 0.5 * found[1]

    def make(model, kd) -> Step:
        criterion = own_loss if kd is None else kd.criterion(own_loss)
        return plain_step(model, lambda: criterion(model(images), masks))

    return variants(student, teacher, images, make, at="backbone.15")


def detection(args) -> dict[str, Step]:
    """Torchvision's reference script: lists of images; KD layers in the backbone."""
    size = 64 if args.quick else 96
    options = {"weights": None, "weights_backbone": None, "num_classes": 5, "box_score_thresh": 0.5}
    options |= {"min_size": size, "max_size": size}
    make_model = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    student, teacher = (make_model(**options).to(args.device) for _ in "st")
    images = [torch.rand(3, size, size, device=args.device) for _ in range(2)]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 40.0]], device=args.device)
    targets = [{"boxes": boxes, "labels": torch.tensor([2], device=args.device)} for _ in images]

    def make(model, kd) -> Step:
        def loss() -> torch.Tensor:
            own = sum(model(images, targets).values())
            return own if kd is None else own + kd.loss()

        return plain_step(model, loss)

    return variants(student, teacher.eval(), images, make, "backbone.body.13", losses=False)


def accelerate_loop(args) -> dict[str, Step]:
    """The loop with Accelerate in cv_example.py and in the script without Trainer."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=args.device == "cpu")
    student, teacher, images, labels = pair(args, 32 if args.quick else 64)

    def make(model, kd) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9)
        model, optimizer = accelerator.prepare(model, optimizer)
        model.train()

        def step() -> None:
            loss = F.cross_entropy(model(images), labels)
            accelerator.backward(loss if kd is None else loss + kd.loss(labels))
            optimizer.step()
            optimizer.zero_grad()

        return step

    return variants(student, teacher, images, make)


def trainer(args) -> dict[str, Step]:
    """Hugging Face's Trainer: a training step with label smoothing."""
    import transformers as hf

    from kdlayers.integrations.transformers import KDTrainer

    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "layer_type": "basic"}
    make_model = lambda depth: hf.ResNetForImageClassification(  # noqa: E731
        hf.ResNetConfig(**sizes, depths=[depth] * 4, num_labels=CLASSES)
    ).to(args.device)
    student, teacher = make_model(1), make_model(2).eval()
    size = 32 if args.quick else 64
    batch = {"pixel_values": torch.randn(BATCH, 3, size, size, device=args.device)}
    batch["labels"] = torch.randint(CLASSES, (BATCH,), device=args.device)
    options = {"report_to": "none", "use_cpu": args.device == "cpu", "label_smoothing_factor": 0.1}
    training = hf.TrainingArguments(tempfile.mkdtemp(), **options)

    def make(model, kd) -> Step:
        run = KDTrainer(model, training, kd=kd)
        run.create_optimizer()
        run.current_gradient_accumulation_steps = 1  # train() would set this

        def step() -> None:
            run.training_step(model, dict(batch))
            run.optimizer.step()
            run.optimizer.zero_grad()

        return step

    return variants(student, teacher, batch["pixel_values"], make, "resnet.encoder.stages.3")


def lightning(args) -> dict[str, Step]:
    """Lightning: ten steps of a trainer, including its start."""
    import logging

    import lightning.pytorch as pl
    from torch.utils.data import DataLoader, TensorDataset

    from kdlayers.integrations.lightning import KDCallback

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    student, teacher, images, labels = pair(args, 32 if args.quick else 64)
    loader = DataLoader(TensorDataset(images.repeat(10, 1, 1, 1), labels.repeat(10)), BATCH)
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    device = "cpu" if args.device == "cpu" else "gpu"
    options = dict.fromkeys(quiet, False) | {"accelerator": device, "devices": 1, "max_epochs": 1}

    class Module(pl.LightningModule):
        def __init__(self, model: nn.Module, kd: KDHandle | None) -> None:
            super().__init__()
            self.model, self.kd = model, kd

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            x, y = batch
            loss = F.cross_entropy(self.model(x), y)
            return loss if self.kd is None else loss + self.kd.loss(y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-4, momentum=0.9)

    def make(model, kd) -> Step:
        def step() -> None:
            callbacks = [] if kd is None else [KDCallback(kd)]
            pl.Trainer(**options, callbacks=callbacks).fit(Module(model, kd), loader)

        return step

    return variants(student, teacher, images, make)


def plain_step(model: nn.Module, loss: Callable[[], torch.Tensor]) -> Step:
    """A step with SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-5, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


SCRIPTS = {
    "transformers Trainer": trainer,
    "timm train.py": timm_train,
    "torchvision classification": classification,
    "torchvision segmentation": segmentation,
    "torchvision detection": detection,
    "Accelerate": accelerate_loop,
    "Lightning": lightning,
}

if __name__ == "__main__":
    main()
