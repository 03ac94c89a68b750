"""Converts images for a teacher that does not expect the student's normalisation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers._utils.warn import warn
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import work_dtype

Numbers: TypeAlias = float | Sequence[float]
_NAMES = ("mean", "std")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


class Renormalize:
    r"""Converts images normalised for the student to the normalisation of the teacher.

    .. math:: x' = \frac{(x \, \sigma_s + \mu_s) - \mu_t}{\sigma_t}

    where :math:`\mu, \sigma` are the mean and standard deviation of each channel for the two
    models. Pass it as ``attach_kd(..., teacher_transform=Renormalize(...))``. With
    ``teacher_transform="auto"``, it is created from the ``pretrained_cfg`` of timm models.

    Args:
        student: (mean, std) of the training script; each a number, or one number for each channel.
        teacher: (mean, std) that the teacher was trained with.
        size: height and width of the teacher's images, or one number for both; ``None`` (default):
            the student's size. Images are resized after the normalisation, with antialiasing
            unless ``interpolation`` is ``"nearest"``.
        interpolation: ``"bilinear"`` (default), ``"bicubic"`` or ``"nearest"``.

    Raises:
        ArgumentError: if a std is not positive, numbers are missing, or ``size`` or
            ``interpolation`` is invalid.
        ArgumentTypeError: if ``student`` or ``teacher`` is not a pair; at the call, if the images
            are not a floating-point tensor.
        ShapeError: at the call, if the images are not ``[..., channels, height, width]``.

    Example:
        >>> import torch
        >>> from kdlayers import Renormalize
        >>> imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        >>> to_teacher = Renormalize(student=imagenet, teacher=(0.5, 0.5))
        >>> black = (torch.zeros(1, 3, 2, 2) - torch.tensor(imagenet[0]).view(3, 1, 1))
        >>> to_teacher(black / torch.tensor(imagenet[1]).view(3, 1, 1))[0, :, 0, 0]
        tensor([-1.0000, -1.0000, -1.0000])
    """

    def __init__(
        self,
        student: tuple[Numbers, Numbers],
        teacher: tuple[Numbers, Numbers],
        size: int | tuple[int, int] | None = None,
        *,
        interpolation: str = "bilinear",
    ) -> None:
        self.student, self.teacher = _pair("student", student), _pair("teacher", teacher)
        lengths = {len(numbers) for pair in (self.student, self.teacher) for numbers in pair} - {1}
        if len(lengths) > 1:
            raise ArgumentError(
                f"Renormalize: mean and std must be numbers for the same channels, got "
                f"{sorted(lengths)} numbers"
            )
        self.channels = max(lengths, default=None)
        self.size = _size(size)
        if interpolation not in _INTERPOLATIONS:
            raise ArgumentError(
                f"interpolation must be one of {', '.join(_INTERPOLATIONS)}, got {interpolation!r}"
            )
        self.interpolation = interpolation
        self._kept: tuple[Tensor, Tensor] | None = None

    def __call__(self, images: Tensor) -> Tensor:
        """The images for the teacher, ``[..., C, H, W]``, of the same dtype."""
        _check_images(images, self.channels)
        if self.student != self.teacher:
            work = work_dtype(images)
            factor, shift = self._affine(images.device, work)
            images = (images.to(work) * factor + shift).to(images.dtype)
        return images if self.size is None else self._resized(images, self.size)

    def _affine(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Factor and shift, ``[C, 1, 1]``; cached, because a copy to the device takes time."""
        if self._kept is None or (self._kept[0].device, self._kept[0].dtype) != (device, dtype):
            (mean, std), (other_mean, other_std) = (
                [torch.tensor(numbers, dtype=torch.float64, device="cpu") for numbers in pair]
                for pair in (self.student, self.teacher)
            )
            found = (std / other_std, (mean - other_mean) / other_std)
            factor, shift = (t.to(device, dtype).view(-1, 1, 1) for t in found)
            self._kept = factor, shift
        return self._kept

    def _resized(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(images.shape[-2:]) == size:
            return images
        antialias = self.interpolation != "nearest"
        options = {"antialias": True, "align_corners": False} if antialias else {}
        # One batch axis, and float32 or wider: interpolate refuses other axes, and half on CPUs.
        batch = images.reshape(-1, *images.shape[-3:]).to(work_dtype(images))
        found = F.interpolate(batch, size, mode=self.interpolation, **options)
        return found.to(images.dtype).reshape(*images.shape[:-2], *size)

    def __repr__(self) -> str:
        parts = [f"student={self.student}", f"teacher={self.teacher}"]
        if self.size is not None:
            parts += [f"size={self.size}", f"interpolation={self.interpolation!r}"]
        return f"Renormalize({', '.join(parts)})"


@dataclass(frozen=True)
class Stated:
    """The images that a model expects, according to its configuration."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int] | None
    interpolation: str
    fixed: bool
    """Whether the model only takes this size."""


def stated_by(model: nn.Module) -> Stated | None:
    """Reads timm's ``pretrained_cfg``; ``None`` for models without one."""
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, dict) or "mean" not in config or "std" not in config:
        return None
    size = config.get("input_size")
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if isinstance(patches, (tuple, list)):
        size = patches  # pretrained_cfg still has the size of the weights
    interpolation = str(config.get("interpolation") or "bilinear")
    return Stated(
        tuple(map(float, config["mean"])),
        tuple(map(float, config["std"])),
        None if size is None else (int(size[-2]), int(size[-1])),
        interpolation if interpolation in _INTERPOLATIONS else "bilinear",
        bool(config.get("fixed_input_size")),
    )


def automatic(student: nn.Module, teacher: nn.Module) -> Renormalize:
    """Create the transform of ``teacher_transform="auto"`` from the configuration of both models.

    The images are resized to the teacher's size if the two models expect different sizes, or if
    the teacher only takes one size. Otherwise they keep their size.

    Raises:
        ArgumentError: if one of the models has no such configuration.
    """
    ours, theirs = stated_by(student), stated_by(teacher)
    if ours is None or theirs is None:
        silent = type(student if ours is None else teacher).__name__
        raise ArgumentError(
            f'teacher_transform="auto" reads the pretrained_cfg of timm models, but {silent} has '
            "none; pass teacher_transform=Renormalize(student=(mean, std), teacher=(mean, std)), "
            "or None if both expect the same images"
        )
    resize = theirs.fixed or ours.size != theirs.size
    return Renormalize(
        (ours.mean, ours.std),
        (theirs.mean, theirs.std),
        theirs.size if resize else None,
        interpolation=theirs.interpolation,
    )


def warn_of_difference(student: nn.Module, teacher: nn.Module) -> None:
    """Warn if the models expect different normalisations and no transform was given."""
    ours, theirs = stated_by(student), stated_by(teacher)
    if ours is None or theirs is None or (ours.mean, ours.std) == (theirs.mean, theirs.std):
        return
    warn(
        f"the student ({type(student).__name__}) expects images with mean {ours.mean} and std "
        f"{ours.std}, the teacher ({type(teacher).__name__}) mean {theirs.mean} and std "
        f'{theirs.std}; pass attach_kd(..., teacher_transform="auto") if the images are normalised '
        "for the student, or teacher_transform=lambda images: images if one normalisation suits "
        "both"
    )


def _pair(name: str, value: object) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ArgumentTypeError(
            f"Renormalize: {name} must be (mean, std), such as ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), "
            f"got {value!r}"
        )
    mean, std = (_numbers(f"{name}'s {part}", v) for part, v in zip(_NAMES, value, strict=True))
    for number in std:
        check.positive(f"Renormalize: {name}'s std", number)
    return mean, std


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    given = value.tolist() if isinstance(value, Tensor) else value
    try:
        return tuple(map(float, given if isinstance(given, (tuple, list)) else (given,)))
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"Renormalize: {name} must be a number or one for each channel, got {value!r}"
        ) from None


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ArgumentError(f"size must be one number, or height and width, got {size!r}")
    height, width = pair
    return check.count("size", height), check.count("size", width)


def _check_images(images: object, channels: int | None) -> None:
    if not isinstance(images, Tensor) or not images.is_floating_point():
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentTypeError(f"Renormalize takes a floating-point tensor of images, got {found}")
    if images.dim() < 3 or channels not in (None, images.shape[-3]):
        raise ShapeError(
            f"Renormalize takes images [..., {channels or 'channels'}, height, width], got "
            f"{check.shape(images)}"
        )
