"""A small CNN learns from a foundation model without labels, then is fine-tuned with a few labels.

The teacher can be any image encoder of timm, such as DINOv2, DINOv3, CLIP or SigLIP. By default the
script trains a small ViT on half of the classes instead. The student sees the other classes.

    python examples/label_free.py                 # digits, three seeds, in a few minutes
    python examples/label_free.py --data DIR --teacher vit_small_patch14_dinov2.lvd142m
"""

from __future__ import annotations

import json
from collections.abc import Callable

import data
import timm
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from kdlayers import FeatureLoss, KDHandle, Renormalize, attach_kd, find_points

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"channels": (16, 32, 64, 128), "output_stride": 8, "num_classes": 0}


def main() -> None:
    """Evaluate the teacher, distilled students and untrained students."""
    options = data.options(__doc__, epochs=15)
    options.add_argument("--teacher", metavar="NAME", help="timm model; default: train a ViT")
    images = data.load(args := options.parse_args())
    known = 0 if args.teacher else len(images.classes) // 2
    labels, tested = (torch.tensor([y for _, y in part]) for part in (images.plain, images.test))
    new, old = torch.where(labels >= known)[0], torch.where(labels < known)[0]
    few = torch.cat([new[labels[new] == c][:10] for c in labels[new].unique()])
    parts = Subset(images.plain, new), Subset(images.test, torch.where(tested >= known)[0])
    torch.manual_seed(0)
    if args.teacher:
        teacher = timm.create_model(args.teacher, pretrained=True, num_classes=0).to(DEVICE)
        mean, std, size = (teacher.pretrained_cfg[k] for k in ("mean", "std", "input_size"))
        transform = Renormalize((0.5, 0.25), (mean, std), size[1:])
    else:
        transform, side = torch.as_tensor, images.example.shape[-1]
        shape = {"img_size": side, "patch_size": side // 4, "embed_dim": 128, "num_heads": 4}
        teacher = timm.create_model("vit_tiny_patch16_224", depth=4, num_classes=known, **shape)
        train(teacher.to(DEVICE), Subset(images.augmented, old), 2 if args.quick else 15, 1e-3)
        teacher.reset_classifier(0)
    more = {"example": images.example, "teacher_transform": transform}
    last = find_points(teacher, transform(images.example.to(DEVICE)))[-1].name
    print(json.dumps({"model": "teacher", **probes(teacher, *parts, transform)}))
    for seed in range(1 if args.quick else 3):
        for name in ("untrained", "distilled"):
            torch.manual_seed(seed)
            student = timm.create_model("resnet10t", **SMALL).to(DEVICE)
            if name == "distilled":
                losses = [FeatureLoss(name="image"), FeatureLoss(at=("layer4", last))]
                kd = attach_kd(student, teacher, losses=losses, **more)
                train(student, Subset(images.augmented, new), args.epochs, 3e-3, kd)
                kd.detach()
            found = probes(student, *parts)
            student.reset_classifier(len(images.classes))
            train(student.to(DEVICE), Subset(images.augmented, few), 60, 1e-3)
            output, y = embed(student, parts[1])
            found |= {"fine-tuned": 100 * float((output.argmax(1) == y).mean()), "seed": seed}
            print(json.dumps({"model": name, **found}), flush=True)


def train(model: nn.Module, images: Dataset, epochs: int, lr: float, kd: KDHandle | None = None):
    """Train with labels or, if there is a handle, with the teacher alone."""
    loader = DataLoader(images, min(50, len(images)), shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW([*model.parameters(), *(kd.parameters() if kd else [])], lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, epochs * len(loader))
    for x, y in (batch for _ in range(epochs) for batch in loader):
        output = model.train()(x.to(DEVICE))
        loss = kd.loss() if kd else F.cross_entropy(output, y.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def embed(model: nn.Module, images: Dataset, see: Callable = torch.as_tensor):
    """The model's outputs for all images, and the labels."""
    pairs = [(model.eval()(see(x.to(DEVICE))).cpu(), y) for x, y in DataLoader(images, 250)]
    return [torch.cat(part).numpy() for part in zip(*pairs, strict=True)]


def probes(model: nn.Module, train: Dataset, test: Dataset, *see: Callable) -> dict[str, float]:
    """Accuracy of a k-NN classifier and of a linear classifier on frozen features."""
    train, test = embed(model, train, *see), embed(model, test, *see)
    kinds = {"k-NN": KNeighborsClassifier(10), "linear": LogisticRegression(max_iter=999)}
    return {name: 100 * probe.fit(*train).score(*test) for name, probe in kinds.items()}


if __name__ == "__main__":
    main()
