"""Segmentation and detection on synthetic shapes: distillation compared with labels only.

    python examples/recipes/dense_shapes.py segmentation    # ten minutes on one core
    python examples/recipes/dense_shapes.py detection

The teacher is trained on 1,000 images. Each student is trained on 64 other images, which differ for
each seed. All methods use the same number of steps and the same initial weights. Each run prints
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for examples/common

import torch
import torch.nn.functional as F
from _shapes import SIDE, Shapes, average_precision, detector, mean_iou, segmenter, shapes
from common.training import Terms, optimise
from torch import Tensor, nn

from kdlayers import ChannelWiseLoss, DistillLoss, FeatureLoss, KDHandle, KDLoss, attach_kd

SMALL, LARGE = ([16, 32, 48], 1), ([32, 64, 128], 1)  # widths and depth
TEACHER_IMAGES, TEST_IMAGES, BATCH = 1000, 200, 8
LEVELS = [f"fpn.layer_blocks.{level}" for level in range(3)]  # the finest first
METHODS: dict[str, dict[str, Callable[[], list[DistillLoss]]]] = {
    "segmentation": {
        "labels only": list,
        "KD": lambda: [KDLoss(temperature=1.0)],
        "KD + CWD": lambda: [KDLoss(temperature=1.0), ChannelWiseLoss(temperature=1.0, weight=5.0)],
    },
    "detection": {
        "labels only": list,
        "the finest level": lambda: [FeatureLoss(at=LEVELS[0], distance="mse")],
        "every level": lambda: [FeatureLoss(at=level, distance="mse") for level in LEVELS],
    },
}


def main() -> None:
    """Train the teacher, then a student for each method and seed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("task", choices=METHODS)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds; default: 3")
    parser.add_argument("--images", type=int, default=64, help="per student; default: 64")
    parser.add_argument("--steps", type=int, default=200, help="per student; default: 200")
    parser.add_argument("--teacher-steps", type=int, default=600, help="default: 600")
    parser.add_argument("--out", type=Path, help="file to append the lines to")
    args = parser.parse_args()
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    run = segment if args.task == "segmentation" else detect
    test = shapes(TEST_IMAGES, seed=999)
    kinds = ("lraspp", "deeplab") if args.task == "segmentation" else ("Faster R-CNN",)
    teacher, score = run(
        kinds[-1], LARGE, shapes(TEACHER_IMAGES, seed=1000), test, args.teacher_steps, seed=0
    )
    write(args, {"model": kinds[-1], "method": "teacher", "score": score})
    for seed in range(args.seeds):
        few = shapes(args.images, seed)
        for kind in kinds:
            for method, losses in METHODS[args.task].items():
                found = {"model": kind, "method": method, "seed": seed}
                how = {"seed": seed, "teacher": teacher, "losses": losses()}
                found["score"] = run(kind, SMALL, few, test, args.steps, **how)[1]
                write(args, found)


def write(args: argparse.Namespace, line: dict[str, object]) -> None:
    """Print a line and append it to the file."""
    text = json.dumps({"task": args.task, **line})
    print(text, flush=True)
    if args.out:
        with args.out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def segment(
    kind: str,
    size: tuple[list[int], int],
    data: Shapes,
    test: Shapes,
    steps: int,
    seed: int,
    teacher: nn.Module | None = None,
    losses: Sequence[DistillLoss] = (),
) -> tuple[nn.Module, float]:
    """Train a segmentation model; returns the model and its mean IoU."""
    torch.manual_seed(seed)
    model = segmenter(kind, *size)
    kd = None
    if losses:  # the input is a map, so the losses expect class maps
        kd = attach_kd(model, teacher, losses=losses, example=torch.zeros(2, 3, SIDE, SIDE))

    def loss(chosen: Tensor) -> tuple[Tensor, Terms]:
        masks = data.masks[chosen]
        value = F.cross_entropy(model(data.images[chosen])["out"], masks)
        return (value + kd.loss(masks) if kd else value), {}

    train(model, kd, loss, len(data.images), steps, seed)
    model.eval()
    with torch.no_grad():
        predicted = [model(x)["out"].argmax(1) for x in test.images.split(50)]
    return model, mean_iou(torch.cat(predicted), test.masks)


def detect(
    kind: str,  # noqa: ARG001  # there is only one kind
    size: tuple[list[int], int],
    data: Shapes,
    test: Shapes,
    steps: int,
    seed: int,
    teacher: nn.Module | None = None,
    losses: Sequence[DistillLoss] = (),
) -> tuple[nn.Module, float]:
    """Train a detector; its backbone learns from the teacher's. Returns the model and its AP."""
    torch.manual_seed(seed)
    model = detector(*size)
    kd = None
    if losses:
        example = torch.zeros(2, 3, SIDE, SIDE)
        kd = attach_kd(model.backbone, teacher.backbone, losses=losses, example=example)

    def loss(chosen: Tensor) -> tuple[Tensor, Terms]:
        pictures, boxes = list(data.images[chosen]), [data.boxes[i] for i in chosen.tolist()]
        value = sum(model(pictures, boxes).values())
        return (value + kd.loss() if kd else value), {}

    train(model, kd, loss, len(data.images), steps, seed)
    model.eval()
    with torch.no_grad():
        found = [boxes for x in test.images.split(50) for boxes in model(list(x))]
    return model, average_precision(found, test.boxes)


def train(
    model: nn.Module,
    kd: KDHandle | None,
    loss: Callable[[Tensor], tuple[Tensor, Terms]],
    count: int,
    steps: int,
    seed: int,
) -> None:
    """Train on random batches, which are the same for all methods."""
    draw = torch.Generator().manual_seed(seed)
    batches = (torch.randperm(count, generator=draw)[:BATCH] for _ in range(steps))
    optimizer = torch.optim.AdamW([*model.parameters(), *(kd.parameters() if kd else [])], 5e-3)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)

    optimizer.register_step_pre_hook(clip)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, steps)
    model.train()
    optimise(batches, loss, optimizer, schedule)
    if kd:
        kd.detach()


if __name__ == "__main__":
    main()
