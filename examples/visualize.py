"""What a student's KD layers see, as a page of figures: open runs/visualize/index.html.

Trains a teacher, and a student with KD layers at three points and AEKT's loss, then draws them.

    python examples/visualize.py                # digits, in a few minutes
    python examples/visualize.py --data DIR     # your images: DIR/train/CLASS/, DIR/val/CLASS/
"""

from __future__ import annotations

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import AEKTLoss, CodebookTargets, DecisionTargets, KDHandle, KDPoint, attach_kd, viz

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGE = "trunk_output.block3"
NAMES = ("trunk_output.block2", f"{STAGE}.block3-0", STAGE)  # a finer grid; letKD-2's two points


def main() -> None:
    """Train, draw, and write the page."""
    args = data.options(__doc__, epochs=10).parse_args()
    images = data.load(args)
    classes = len(images.classes)
    torch.manual_seed(0)
    teacher = regnet([1, 2, 2], [32, 64, 128], classes)
    train(teacher, images.augmented, 1 if args.quick else 6)
    student = regnet([1, 1, 2], [16, 32, 64], classes)
    decisions = DecisionTargets(subclasses=2)
    targets = (CodebookTargets(32), decisions, CodebookTargets(32))
    points = [KDPoint(name, targets=target) for name, target in zip(NAMES, targets, strict=True)]
    aekt = AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)
    kd = attach_kd(student, teacher, points, losses=[aekt], example=images.example)
    kd.fit(DataLoader(images.plain, 50))
    train(student, images.augmented, args.epochs, kd)
    kd.detach()

    page = ['<meta charset="utf-8"><style>img{max-width:100%}</style><h1>KD layers</h1>']

    def show(name: str, figure: object, caption: str) -> None:
        figure.savefig(args.out / f"{name}.png", dpi=110)
        page.append(f'<h2>{name}</h2><p>{caption}</p><img src="{name}.png" alt="{name}">')
        print(args.out / f"{name}.png", flush=True)

    pixels = examples(images)
    looks = (0.25 * pixels + 0.5).clamp(0, 1)  # undo Normalize in data.py
    for name in NAMES:
        view = viz.layer_view(student, pixels.to(DEVICE), name)
        show(
            f"matches-{name.replace('.', '-')}",
            viz.plot_matches(view, looks),
            "The best-matching template of each region, the length of the features and of what the "
            "layer adds to them, and the features before and after the layer. Similar colours mean "
            "similar features.",
        )
        usage = viz.template_usage(student, DataLoader(images.test, 250), name)
        caption = f"How often each template fires and is best, in {usage.positions:,} regions."
        show(f"usage-{name.replace('.', '-')}", viz.plot_usage(usage), caption)
    figure = viz.plot_decisions(decisions, images.classes)
    show("decisions", figure, "Which sub-classes the teacher sees at the positions of each one.")
    figure = viz.plot_relations(aekt.relations(), images.classes)
    show("relations", figure, "How much each of the student's logits counts for each class.")
    (args.out / "index.html").write_text("\n".join(page), "utf-8")
    print(f"wrote {args.out / 'index.html'}")


def examples(images: data.Images) -> torch.Tensor:
    """The first test image of each of five classes."""
    first = {label: image for image, label in reversed([*images.test])}
    return torch.stack([first[label] for label in sorted(first)[:5]])


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0]).to(DEVICE)


def train(model: nn.Module, images: Dataset, epochs: int, kd: KDHandle | None = None) -> None:
    """An ordinary loop, with one more term if there is a handle."""
    loader = DataLoader(images, 50, shuffle=True, drop_last=True)
    parameters = [*model.parameters(), *(kd.parameters() if kd else [])]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for _ in range(epochs):
        for x, y in loader:
            x, y = x.to(DEVICE), y.to(DEVICE)
            loss = F.cross_entropy(model.train()(x), y) + (kd.loss(y) if kd else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


if __name__ == "__main__":
    main()
