"""The teacher's outputs for fixed augmented views, recorded once for all methods and seeds.

The runs then need no forward of the teacher. In exchange, each image has only a few views, which
are the same in all epochs and for all methods. View 0 is the image without augmentation; ``kd.fit``
uses it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from common.files import claimed
from common.images import Images, augmented
from common.training import device_of
from torch import Tensor, nn

CHANNELS_MEAN = ("layer1", "layer2")
BATCH = 100
SHAPES = "shapes.json"


class Record:
    """The images of all views and the teacher's outputs for them, read from a folder on demand.

    Args:
        folder: folder with one subfolder for each view.
        split: the images without augmentation.
        views: number of augmented views, not counting view 0.
    """

    def __init__(self, folder: Path, split: Images, views: int) -> None:
        self.folder = folder
        self.split = split
        self.views = views
        self._files: dict[str, list[Tensor]] = {}
        self._whole: dict[str, Tensor] = {}
        for view in range(1 + views):
            for name, shape in json.loads((folder / str(view) / SHAPES).read_text("utf-8")).items():
                kind = torch.uint8 if name == "pixels" else torch.float16
                values = mapped(folder / str(view) / name, shape, kind)
                self._files.setdefault(name, []).append(values)
        self.points = [name for name in self._files if name not in ("pixels", "logits")]

    @property
    def device(self) -> torch.device:
        """The device of the tensors."""
        return self.split.labels.device

    def to(self, device: torch.device | str) -> Record:
        """Load the whole record into the memory of a device, such as a GPU."""
        self.split = self.split.to(device)
        for name, files in self._files.items():
            whole = files[0].new_empty((len(files), *files[0].shape), device=device)
            for view, values in zip(whole, files, strict=True):
                view.copy_(values)  # one at a time: all of them twice may not fit
            self._whole[name] = whole
        return self

    def take(self, name: str, views: Tensor, index: Tensor) -> Tensor:
        """``"pixels"``, ``"logits"`` or the features of a point, for some images in some views."""
        if name in self._whole:
            return self._whole[name][views, index]
        files = self._files[name]
        pairs = zip(views.tolist(), index.tolist(), strict=True)
        return torch.stack([files[view][image] for view, image in pairs])


def mapped(path: Path, shape: Sequence[int], kind: torch.dtype) -> Tensor:
    """A memory-mapped tensor."""
    count = torch.Size(shape).numel()
    return torch.from_file(str(path), shared=False, size=count, dtype=kind).view(*shape)


def recorded(
    teacher: nn.Module,
    teacher_hash: str,
    split: Images,
    points: Sequence[str],
    cache: Path,
    *,
    views: int,
    padding: int,
) -> Record:
    """The record of these images in ``cache``; missing views are recorded first.

    Several processes can share the work. Each one records a view at a time.

    Args:
        teacher: the teacher.
        teacher_hash: identifies the teacher.
        split: the images.
        points: modules of the teacher whose outputs are stored. For ``layer1`` and ``layer2``,
            which only attention transfer reads, the root mean square over the channels is stored:
            it is one channel and has the same attention map.
        cache: folder of all records.
        views: number of augmented views of each image, cropped and mirrored at random.
        padding: padding of the crops.
    """
    about = [teacher_hash, list(points), padding, str(split.mean), str(split.std)]
    digest = hashlib.sha256(json.dumps(about).encode())
    digest.update(split.pixels.numpy().tobytes())
    folder = cache / f"record-{digest.hexdigest()[:12]}"
    missing = list(range(1 + views))
    while missing:
        for view in missing:
            part = folder / str(view)
            with claimed(folder / f"{view}.lock") as mine:
                if mine and not (part / SHAPES).exists():
                    print(f"recording view {view} of {len(split):,} images: {part}", flush=True)
                    part.mkdir(parents=True, exist_ok=True)
                    write(teacher, split, points, part, view, padding)
        missing = [view for view in missing if not (folder / str(view) / SHAPES).exists()]
        if missing:  # another process is recording them
            time.sleep(2)
    record = Record(folder, split, views)
    device = device_of(teacher)
    return record if device.type == "cpu" else record.to(device)


@torch.no_grad()
def write(
    teacher: nn.Module, split: Images, points: Sequence[str], folder: Path, view: int, padding: int
) -> None:
    """Record one view. The file of shapes is written last and marks the view as complete."""
    draw = torch.Generator().manual_seed(view)
    shapes: dict[str, list[int]] = {}
    taps: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = {
            name: stack.enter_context((folder / name).open("wb"))
            for name in ("pixels", "logits", *points)
        }
        for name in points:
            hook = teacher.get_submodule(name).register_forward_hook(
                lambda _, __, output, name=name: taps.__setitem__(name, output)
            )
            stack.callback(hook.remove)
        teacher.eval()
        for part in split.pixels.split(BATCH):
            images = augmented(part, padding, True, draw) if view else part
            logits = teacher(split.normalised(images).to(device_of(teacher)))
            found = {"pixels": images, "logits": logits.half()}
            found |= {name: kept(name, taps[name]) for name in points}
            for name, value in found.items():
                files[name].write(value.cpu().contiguous().numpy().tobytes())
                shapes[name] = [len(split), *value.shape[1:]]
    (folder / SHAPES).write_text(json.dumps(shapes), "utf-8")


def kept(name: str, maps: Tensor) -> Tensor:
    """The part of a point's output that is stored."""
    if name in CHANNELS_MEAN:
        maps = maps.square().mean(1, keepdim=True).sqrt()
    return maps.half()


class Tap(nn.Module):
    """Replaces a module of the teacher; its output is the recorded tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """The recorded tensor."""
        return x


class Replay(nn.Module):
    """Replaces the teacher in ``attach_kd`` and returns recorded outputs.

    Args:
        record: the recorded outputs.

    Attributes:
        keys: view and index of the images of the next batch, ``[2, B]``. Before `told` sets them,
            the outputs are those of the first images, because dry runs only need shapes.
    """

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record
        self.keys: Tensor | None = None
        self.register_buffer("device", torch.zeros((), device=record.device))
        for name in record.points:
            parent: nn.Module = self
            *containers, last = name.split(".")
            for container in containers:
                if container not in dict(parent.named_children()):
                    parent.add_module(container, nn.Module())
                parent = parent.get_submodule(container)
            parent.add_module(last, Tap())

    def told(self, views: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Select a batch for the next forward; returns its normalised images and its labels."""
        self.keys = torch.stack([views, index])
        split = self.record.split
        return split.normalised(self.record.take("pixels", views, index)), split.labels[index]

    @torch.autocast("cpu", enabled=False)  # under bfloat16 it cannot stack float16
    def forward(self, images: Tensor) -> Tensor:
        """The recorded logits; each point's module returns its recorded features."""
        first = torch.arange(len(images), device=self.record.device)
        views, index = self.keys if self.keys is not None else (torch.zeros_like(first), first)
        if len(index) != len(images):
            raise RuntimeError(f"{len(index)} recorded images for a batch of {len(images)}")
        for name in self.record.points:
            self.get_submodule(name)(self.record.take(name, views, index).float())
        return self.record.take("logits", views, index).float()


class RecordedBatches:
    """Batches of recorded views; each batch is first selected in the teacher's record.

    The epochs cycle through the views of each image, starting from a random one, so that ``views``
    epochs show each view once. Order and views depend only on seed and epoch.

    Args:
        teacher: the module that replaces the teacher.
        size: batch size; an incomplete last batch is dropped.
        seed: seed of order and views.
    """

    def __init__(self, teacher: Replay, size: int, seed: int) -> None:
        self.teacher = teacher
        self.size = size
        self.seed = seed
        draw = torch.Generator().manual_seed(104_729 + seed)
        first = torch.randint(teacher.record.views, (len(teacher.record.split),), generator=draw)
        self.first = first.to(teacher.record.device)

    def __len__(self) -> int:
        return len(self.first) // self.size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of one epoch."""
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(self.first), generator=draw).to(self.first.device)
        views = 1 + (self.first + epoch) % self.teacher.record.views
        for index in order[: len(self) * self.size].split(self.size):
            yield self.teacher.told(views[index], index)

    def plain(self, size: int) -> Plain:
        """View 0 of all images in a random order, for ``kd.fit``."""
        draw = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self.first), generator=draw)
        return Plain(self.teacher, order.to(self.first.device), size)


class Plain:
    """View 0 of all images; can be iterated several times."""

    def __init__(self, teacher: Replay, order: Tensor, size: int) -> None:
        self.teacher = teacher
        self.order = order
        self.size = size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in self.order.split(self.size):
            yield self.teacher.told(torch.zeros_like(index), index)
