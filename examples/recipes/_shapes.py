"""Synthetic shapes for segmentation and detection, small networks, and metrics."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabV3
from torchvision.models.segmentation.lraspp import LRASPP
from torchvision.ops import box_iou

SIDE = 64
CLASSES = 4  # background, disc, square, triangle
Boxes = dict[str, Tensor]


@dataclass(frozen=True)
class Shapes:
    """Images ``[N, 3, 64, 64]``, the class of every pixel ``[N, 64, 64]``, and boxes."""

    images: Tensor
    masks: Tensor
    boxes: list[Boxes]


def shapes(count: int, seed: int) -> Shapes:
    """``count`` images of one to three discs, squares and triangles on a noisy background."""
    draw = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=draw)

    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    images, masks, boxes = [], [], []
    for _ in range(count):
        slope = uniform(-0.3, 0.3, 3, 2) / SIDE
        image = (
            uniform(0.3, 0.7, 3, 1, 1) + slope[:, :1, None] * rows + slope[:, 1:, None] * columns
        )
        mask = torch.zeros(SIDE, SIDE, dtype=torch.long)
        for _ in range(int(torch.randint(1, 4, (), generator=draw))):
            kind = int(torch.randint(1, CLASSES, (), generator=draw))
            radius = uniform(7, 14, 1)
            x, y = ((part - uniform(10, SIDE - 10, 1)) / radius for part in (columns, rows))
            inside = {
                1: x.square() + y.square() < 1,
                2: torch.maximum(x.abs(), y.abs()) < 0.85,
                3: (y < 0.8) & (y > 2 * x.abs() - 1),
            }[kind]
            mask[inside] = kind
            colour = uniform(0.1, 0.7, 3, 1, 1)
            colour[kind - 1] += 0.3  # a hint: discs are redder, squares greener, triangles bluer
            image = torch.where(inside, colour, image)
            # A later shape may cover an earlier one, so each shape has its own number.
            boxes.append((len(images), kind, inside))
        images.append(image + 0.05 * torch.randn(3, SIDE, SIDE, generator=draw))
        masks.append(mask)
    return Shapes(torch.stack(images), torch.stack(masks), framed(boxes, count))


def framed(found: list[tuple[int, int, Tensor]], count: int) -> list[Boxes]:
    """The boxes of all shapes in each image, including covered parts."""
    frames: list[tuple[list[Tensor], list[int]]] = [([], []) for _ in range(count)]
    for image, kind, inside in found:
        y, x = torch.where(inside)
        frames[image][0].append(torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float())
        frames[image][1].append(kind)
    return [{"boxes": torch.stack(b), "labels": torch.tensor(k)} for b, k in frames]


# ------------------------------------------------------------------ networks


def trunk(widths: list[int], depth: int) -> nn.Sequential:
    """A small RegNet of torchvision without its classifier: `stem`, `block1` to `block3`."""
    params = BlockParams([depth] * 3, widths, widths, [1.0] * 3, [2, 2, 2])
    model = RegNet(params, stem_width=widths[0])
    return nn.Sequential(OrderedDict([("stem", model.stem), *model.trunk_output.named_children()]))


def segmenter(kind: str, widths: list[int], depth: int) -> nn.Module:
    """An LR-ASPP or a DeepLabV3 on a trunk; both give ``{"out": [B, classes, H, W]}``."""
    names = {"lraspp": {"block2": "low", "block3": "high"}, "deeplab": {"block2": "out"}}
    body = IntermediateLayerGetter(trunk(widths, depth), names[kind])
    if kind == "lraspp":
        return LRASPP(body, widths[1], widths[2], CLASSES, 32)
    head = ASPP(widths[1], (1, 2, 3), 32)
    return DeepLabV3(body, nn.Sequential(head, nn.Conv2d(32, CLASSES, 1)))


def detector(widths: list[int], depth: int) -> FasterRCNN:
    """A Faster R-CNN with a pyramid of three levels: strides 4, 8 and 16, and 32 by pooling."""
    names = {f"block{level}": str(level) for level in (1, 2, 3)}
    pyramid = BackboneWithFPN(trunk(widths, depth), names, widths, 32)
    anchors = AnchorGenerator(((8,), (16,), (24,), (32,)), ((0.7, 1.0, 1.4),) * 4)
    fewer = {"rpn_pre_nms_top_n_train": 100, "rpn_post_nms_top_n_train": 60}
    fewer |= {"rpn_pre_nms_top_n_test": 100, "rpn_post_nms_top_n_test": 40}
    fewer |= {"rpn_batch_size_per_image": 64, "box_batch_size_per_image": 32}
    return FasterRCNN(
        pyramid,
        None,
        min_size=SIDE,
        max_size=SIDE,
        rpn_anchor_generator=anchors,
        box_head=TwoMLPHead(32 * 7 * 7, 64),
        box_predictor=FastRCNNPredictor(64, CLASSES),
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        **fewer,
    )


# ------------------------------------------------------------------ measures


def mean_iou(predicted: Tensor, masks: Tensor) -> float:
    """Intersection over union of every class over all pixels, averaged over classes, in %."""
    pairs = torch.bincount((CLASSES * masks + predicted).flatten(), minlength=CLASSES**2)
    counts = pairs.view(CLASSES, CLASSES).double()
    both = counts.diagonal()
    return 100 * (both / (counts.sum(0) + counts.sum(1) - both)).mean().item()


def average_precision(found: list[Boxes], true: list[Boxes], overlap: float = 0.5) -> float:
    """Area under the precision-recall curve at an IoU of 0.5, averaged over classes, in %."""
    return 100 * sum(_of_class(found, true, k, overlap) for k in range(1, CLASSES)) / (CLASSES - 1)


def _of_class(found: list[Boxes], true: list[Boxes], kind: int, overlap: float) -> float:
    total, hits = 0, []
    for ours, theirs in zip(found, true, strict=True):
        goals = theirs["boxes"][theirs["labels"] == kind]
        total += len(goals)
        free = torch.ones(len(goals), dtype=torch.bool)
        mine = ours["labels"] == kind
        for box, score in zip(ours["boxes"][mine], ours["scores"][mine], strict=True):
            ious = box_iou(box[None], goals)[0] * free if len(goals) else torch.zeros(1)
            hit = bool(ious.max() >= overlap)
            if hit:
                free[ious.argmax()] = False
            hits.append((score.item(), hit))
    right = torch.tensor([hit for _, hit in sorted(hits, reverse=True)], dtype=torch.double)
    if not len(right):
        return 0.0
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)  # at this recall or a higher one
    return (best * right).sum().item() / total
