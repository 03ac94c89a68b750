"""A teacher that is not in memory: its outputs are read from a record."""

from collections.abc import Iterable
from os import PathLike
from typing import Any

import torch
from torch import nn

from kdlayers._models.layouts import Layout
from kdlayers._models.trace import Call, Trace
from kdlayers._models.vectors import has_class_token
from kdlayers._records.dataset import register
from kdlayers._records.files import Reader
from kdlayers.errors import AttachError


class RecordedTeacher:
    """The teachers' outputs that :meth:`kdlayers.KDHandle.record` wrote, instead of their models.

    Pass it to :func:`kdlayers.attach_kd` as ``teacher``, with points and losses that were recorded.
    The teachers need not be in memory. Each call of ``kd.loss`` then needs ``recorded=key``, and
    ``kd.fit`` a loader of a recorded data set.

    Args:
        path: the folder of the record.

    Raises:
        RecordError: if the record is damaged or unfinished.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDLoss, RecordedTeacher, attach_kd
        >>> student, teacher = resnet18(num_classes=10), resnet18(num_classes=10)
        >>> data = TensorDataset(torch.randn(4, 3, 64, 64), torch.arange(4))
        >>> with TemporaryDirectory() as folder:
        ...     kd = attach_kd(student, teacher, losses=[KDLoss()])
        ...     recorded = kd.record(data, folder, views=1)
        ...     kd.remove()
        ...     kd = attach_kd(student, RecordedTeacher(folder), losses=[KDLoss()])
        ...     x, y, key = next(iter(DataLoader(recorded, batch_size=4)))
        ...     logits = student(x)
        ...     kd.loss(y, recorded=key).shape
        torch.Size([])
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.reader = register(Reader(path))

    def __repr__(self) -> str:
        classes = ", ".join(known["class"] for known in self.reader.description.about["teachers"])
        return f"RecordedTeacher({str(self.reader.path)!r}: {classes})"


class AbsentModel(nn.Module):
    """Replaces the model of a recorded teacher; it cannot run."""

    def __init__(self, kind: str, weights: str, taps: Iterable[str], reader: Reader) -> None:
        super().__init__()
        self.reader = reader  # open for as long as a handle learns from it
        for tap in taps:  # the names of the points
            place: nn.Module = self
            for part in tap.split("."):
                if part not in dict(place.named_children()):
                    place.add_module(part, nn.Identity())
                place = place.get_submodule(part)
        self.kind = kind
        self.weights = weights
        """The hash of the recorded teacher's weights."""
        self.has_class_token = False
        """Whether the first prefix token of its features is a class token, as timm states it."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """Raise an error, because there is no model to run."""
        raise AttachError(
            f"the teacher ({self.kind}) is a record and cannot run: train with batches (x, y, key) "
            "of the recorded data set and kd.loss(y, recorded=key), and fit with a loader of them"
        )


def describe(traced: Trace, taps: Iterable[str]) -> dict[str, Any]:
    """What `traces_of` needs of a teacher's dry run, as JSON values; taps in forward order.

    Nothing here depends on the size of the example: another example makes the same record.
    """
    described = []
    for tap in sorted(taps, key=lambda tap: traced.call(tap).order):
        layout, shape = traced.layout(tap), traced.call(tap).shape
        token = has_class_token(traced.model, tap, layout)
        described.append([tap, layout.kind, layout.prefix, token, shape[layout.channel_dim]])
    logits = traced.logits.shape[1:]
    return {"logits": [*logits[:1], *(1 for _ in logits[1:])], "taps": described}


def traces_of(reader: Reader, batch: int) -> list[Trace]:
    """Dry runs of the recorded teachers on ``batch`` images, with the record's taps and logits."""
    about = reader.description.about
    shapes = {field.name: field.shape for field in reader.description.fields}
    traces = []
    for index, known in enumerate(about["teachers"]):
        model = AbsentModel(known["class"], known["weights"], [t[0] for t in known["taps"]], reader)
        fields = (f"logits of teacher {index}", "logits of all teachers")
        logits = next((shapes[name] for name in fields if name in shapes), known["logits"])
        calls: dict[str, Call] = {}
        layouts: dict[str, Layout] = {}
        for tap, kind, prefix, token, channels in known["taps"]:
            grid = tuple(about["grids"].get(f"{tap} of teacher {index}", (1, 1)))
            layouts[tap] = Layout(kind, prefix, grid)
            model.has_class_token |= token
            shape, cpu = (batch, *_shape(layouts[tap], channels)), torch.device("cpu")
            calls[tap] = Call(tap, (), shape, torch.float32, cpu, len(calls))
        zeros = torch.zeros(batch, *logits)
        traces.append(
            Trace(
                model,
                calls,
                zeros,
                (1, 1),
                "recorded teacher",
                record=str(reader.path),
                _layouts=layouts,
            )
        )
    return traces


def _shape(layout: Layout, channels: int) -> tuple[int, ...]:
    """The shape of one image's features."""
    if layout.kind == "NCHW":
        return channels, *layout.grid
    if layout.kind == "NHWC":
        return *layout.grid, channels
    if layout.kind == "tokens":
        return layout.prefix + layout.grid[0] * layout.grid[1], channels
    return (channels,)
