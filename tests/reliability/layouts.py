"""Architectures, image sizes and layouts: is every feature read with the right axes and positions?

Three kinds of tries. *Networks* are built at random: maps with channels first or last, tokens with
prefix tokens, patches of unequal sides, equal numbers of channels, rows and columns. A network
knows its own layout, and its features are written out as ``[B, H, W, C]`` to compare with. *Pairs*
train such a student against such a teacher on a batch whose height and width are not those of the
example, and compare ``kd.loss`` with the loss computed from the written-out features. *Zoo* takes
torchvision's and timm's architectures at sizes where the channels are as many as rows or columns;
there every layout is compared with the one at a size where the axes differ.
"""

import random
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers import CodebookTargets, KDPoint, attach_kd, find_points
from kdlayers._models.layouts import common_size, pool
from kdlayers._models.trace import trace
from kdlayers._step.sites import slots
from kdlayers.errors import KDLayersError

KINDS = ("NCHW", "NHWC", "tokens")


class Body(nn.Module):
    """Embeds patches, and returns them in the layout ``kind``; keeps them as ``[B, H, W, C]``."""

    def __init__(self, kind: str, channels: int, patch: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.kind = kind
        self.embed = nn.Conv2d(3, channels, patch, patch)
        self.prefix = nn.Parameter(torch.randn(1, prefix, channels))
        self.shift = nn.Parameter(torch.randn(channels))
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        grid = (self.embed(x).movedim(1, -1) + self.shift).relu()
        self.seen = grid.detach()
        if self.kind == "NCHW":
            return grid.movedim(-1, 1)
        if self.kind == "NHWC":
            return grid
        tokens = grid.flatten(1, 2)
        return torch.cat([self.prefix.expand(len(x), -1, -1), tokens], 1)


class Network(nn.Module):
    """A body between functional operations, so that few modules state a layout."""

    def __init__(self, kind: str, channels: int, patch: tuple[int, int], prefix: int) -> None:
        super().__init__()
        self.body = Body(kind, channels, patch, prefix)
        self.head = nn.Linear(channels, 3)
        self.sizes: set[tuple[int, int]] = set()

    def forward(self, x: Tensor) -> Tensor:
        if self.sizes and tuple(x.shape[2:]) not in self.sizes:
            raise ValueError("this network takes images of one size")
        features = self.body(x)
        if self.body.kind == "tokens":
            return self.head(features.mean(1))
        return self.head(features.mean((2, 3) if self.body.kind == "NCHW" else (1, 2)))


def network(rng: random.Random, size: tuple[int, int], *, equal: bool) -> Network:
    """A network for images of ``size``, with as many channels as rows or columns if ``equal``."""
    patch = rng.choice([(2, 2), (4, 4), (4, 2), (2, 4)])
    rows, columns = size[0] // patch[0], size[1] // patch[1]
    channels = rng.choice([rows, columns]) if equal else rng.randint(3, 12)
    kind = rng.choice(KINDS)
    prefix = rng.choice([0, 1, 2, 5]) if kind == "tokens" else 0
    made = Network(kind, channels, patch, prefix).eval()
    if prefix and rng.random() < 0.5:
        made.num_prefix_tokens = prefix
    return made


def sides(rng: random.Random) -> tuple[int, int]:
    """Height and width of images that all patches divide."""
    return rng.choice([8, 12, 16, 24, 32]), rng.choice([8, 12, 16, 24, 32])


def one_network(rng: random.Random) -> str:
    """Is the layout of one network read right, or refused?"""
    size = sides(rng)
    model = network(rng, size, equal=rng.random() < 0.7)
    images = torch.randn(2, 3, *size)
    if rng.random() < 0.3:
        model.sizes = {size}
        if rng.random() < 0.5 and model.body.kind != "tokens":
            model.output_fmt = model.body.kind
    try:
        layout = trace(model, (images,), "model").layout("body")
    except KDLayersError:
        return "refused"
    with torch.no_grad():
        features = model.body(images)
    grid = layout.to_grid(features, size)
    right = grid.shape == model.body.seen.shape and torch.equal(grid, model.body.seen)
    return "right" if right else "silently wrong"


def one_pair(rng: random.Random) -> str:
    """Does ``kd.loss`` compare the same positions on batches of another shape than the example?"""
    size, other = sides(rng), sides(rng)
    student = network(rng, size, equal=rng.random() < 0.5)
    teacher = network(rng, size, equal=rng.random() < 0.5)
    if rng.random() < 0.2:
        teacher.sizes = {size, other}
    targets = CodebookTargets(4)
    point = KDPoint("body", targets=targets)
    images = torch.randn(4, 3, *other)
    try:
        kd = attach_kd(student, teacher, [point], example=torch.zeros(2, 3, *size))
        kd.fit([(images, torch.arange(4) % 3)], progress=False)
        student.train()
        student(images)
        loss = kd.loss()
    except KDLayersError:
        return "refused"
    ours, theirs = student.body.seen, teacher.body.seen
    expected = written_out(student, targets, ours, theirs)
    return "right" if torch.allclose(loss, expected, rtol=1e-3, atol=1e-5) else "silently wrong"


def written_out(student: Network, targets: CodebookTargets, ours: Tensor, theirs: Tensor) -> Tensor:
    """The template loss of two grids ``[B, H, W, C]``."""
    head = slots(student)["body"].head
    scores = head.scale * F.normalize(ours, dim=-1) @ F.normalize(head.weight, dim=1).T
    size = common_size(ours.shape[1:3], theirs.shape[1:3])
    scores, theirs = pool(scores, size), pool(theirs, size)
    wanted = targets.soft_assignment(theirs)
    return F.kl_div(scores.log_softmax(-1), wanted, reduction="none").sum(-1).mean()


# Architectures with the side of a square image at which the layouts are clear.
ZOO: dict[str, int] = {
    "resnet18": 64,
    "mobilenet_v2": 64,
    "mobilenet_v3_small": 64,
    "shufflenet_v2_x0_5": 64,
    "squeezenet1_1": 64,
    "densenet121": 64,
    "convnext_tiny": 64,
    "swin_t": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "timm/resnet10t": 64,
    "timm/mambaout_femto": 64,
    "timm/convnext_atto": 64,
    "timm/pvt_v2_b0": 64,
    "timm/poolformer_s12": 64,
    "timm/edgenext_xx_small": 64,
}
_KNOWN: dict[str, tuple[nn.Module, dict[str, str], list[int]]] = {}


def known(name: str) -> tuple[nn.Module, dict[str, str], list[int]]:
    """A model, its layouts as shapes alone prove them, and its numbers of channels."""
    if name not in _KNOWN:
        torch.manual_seed(0)
        if name.startswith("timm/"):
            import timm

            model = timm.create_model(name.removeprefix("timm/")).eval()
        else:
            from torchvision import models

            model = models.get_model(name, weights=None).eval()
        side = ZOO[name]
        truth, channels = {}, set()
        shapes = outputs(model, (side, side)), outputs(model, (side, side * 2))
        for point, shape in shapes[0].items():
            wide = shapes[1].get(point, ())
            grew = [i for i, (a, b) in enumerate(zip(shape, wide, strict=False)) if a != b]
            if len(shape) == 4 and grew in ([3], [2]):
                truth[point] = "NCHW" if grew == [3] else "NHWC"
                channels.add(shape[1] if grew == [3] else shape[3])
        _KNOWN[name] = model, truth, sorted(channels)
    return _KNOWN[name]


def outputs(model: nn.Module, size: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """The shapes of all plain outputs."""
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: object, output: object) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape)

        return hook

    hooks = [m.register_forward_hook(note(n)) for n, m in model.named_modules()]
    with torch.no_grad():
        model(torch.zeros(1, 3, *size))
    for hook in hooks:
        hook.remove()
    return shapes


def one_of_the_zoo(rng: random.Random) -> str:
    """Are the layouts of an architecture read right where channels equal rows or columns?"""
    name = rng.choice(sorted(ZOO))
    model, truth, channels = known(name)
    stride = rng.choice([4, 8, 16, 32])
    fitting = [c for c in channels if 32 <= c * stride <= 256] or [16]
    size = [rng.choice(fitting) * stride, rng.choice([64, 96, 128])]
    rng.shuffle(size)
    size = [max(64, min(256, side)) for side in size]
    try:
        found = find_points(model, torch.zeros(1, 3, *size))
    except KDLayersError:
        return "refused"
    wrong = [c.name for c in found if c.name in truth and c.layout != truth[c.name]]
    return "silently wrong" if wrong else "right"


def run(tries: int, seed: int) -> dict[str, int]:
    """Counts of ``tries`` tries: one in a hundred with the zoo, half of the others with pairs."""
    rng, counts = random.Random(seed), Counter({"tried": 0, "right": 0, "refused": 0})
    counts["silently wrong"] = 0
    with torch.random.fork_rng(devices=[]):
        for index in range(tries):
            attempt = one_of_the_zoo if index % 100 == 99 else (one_network, one_pair)[index % 2]
            torch.manual_seed(seed * 1_000_003 + index)
            counts["tried"] += 1
            counts[attempt(rng)] += 1
    return dict(counts)
