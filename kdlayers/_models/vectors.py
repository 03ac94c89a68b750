"""Reads the features of an image as one vector: the class token, or the mean over positions."""

from dataclasses import dataclass

from torch import Tensor, nn

from kdlayers._models.layouts import Layout, Size, holders
from kdlayers._models.trace import Trace
from kdlayers.errors import ArgumentError


@dataclass(frozen=True)
class Vectors:
    """Reads one vector per image from a module's output, of any layout."""

    layout: Layout
    class_token: bool = False
    """Whether it is the first token, and not the mean over the grid."""

    def __call__(self, tensor: Tensor, image: Size | None = None) -> Tensor:
        """``[B, C]`` of the module's output; ``image`` is the size of the images."""
        if self.class_token:
            return tensor[:, 0]
        return self.layout.to_grid(tensor, image).mean(dim=(1, 2))

    def of_taps(self, taps: dict[str, Tensor], name: str) -> Tensor:
        """``[B, C]`` of a teacher's taps, which have tokens on their grid."""
        return taps[class_key(name)] if self.class_token else self(taps[name])


def class_key(name: str) -> str:
    """The key of the first token of a module's output, which is stored next to its grid."""
    return f"class token of {name}"  # cannot be a module's name, because it has spaces


def vectors(
    tokens: str, student: Trace, point: str, teacher: Trace, tap: str
) -> tuple[Vectors, Vectors]:
    """Readers of the student's and the teacher's vectors.

    With ``tokens="cls"``, the mean over positions is used for a model without a class token.

    Raises:
        ArgumentError: if class tokens are asked for, and neither point has one.
    """
    layouts = student.layout(point), teacher.layout(tap)
    places = zip((student, teacher), (point, tap), layouts, strict=True)
    found = [tokens == "cls" and has_class_token(t.model, name, y) for t, name, y in places]
    if tokens == "cls" and not any(found):
        raise ArgumentError(
            f'tokens="cls" compares class tokens, but neither {point!r} of the student '
            f"({layouts[0]}) nor {tap!r} of the teacher ({layouts[1]}) has one; use "
            'tokens="pooled"'
        )
    ours, theirs = (Vectors(y, token) for y, token in zip(layouts, found, strict=True))
    return ours, theirs


def has_class_token(model: nn.Module, name: str, layout: Layout) -> bool:
    """Whether the first token at module ``name`` is a class token and not a register."""
    if layout.kind != "tokens" or layout.prefix == 0:
        return False
    for module in holders(model, name):  # the network may be inside a wrapper
        stated = getattr(module, "has_class_token", None)  # timm's, for models with registers
        if stated is not None:
            return bool(stated)
        if hasattr(module, "cls_token"):
            return getattr(module, "cls_token", None) is not None
    return True
