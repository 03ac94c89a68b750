"""Inheritance and exploration: half of the features follow the teacher, the others differ."""

from collections.abc import Iterable
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor
from typing_extensions import Self

from kdlayers._targets.fitter import Fitter, fit_rows
from kdlayers.errors import ArgumentError, CheckpointError, NotFittedError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional import exploration, inheritance
from kdlayers.functional._checks import work_dtype
from kdlayers.functional._inherit import Measure, Scale, check_measure
from kdlayers.losses._attention import attention
from kdlayers.losses._base import DistillLoss, Weight
from kdlayers.losses._coder import (
    AutoEncoder,
    AutoEncoderFitter,
    Coder,
    freeze,
    reconstruction_error,
)
from kdlayers.losses._maps import check_maps, check_positions, on_one_grid

Split: TypeAlias = Literal["natural", "random"]
Host: TypeAlias = Literal["factor", "attention"]
Learning: TypeAlias = Literal["fitted", "online"]
Reconstruction: TypeAlias = Literal["l1", "l2"]
Made = TypeVar("Made")


class InheritExploreLoss(DistillLoss):
    r"""Inheritance and exploration, IE-KD (Huang et al., CVPR 2021).

    The student's channels are split in two parts. One part learns what the teacher knows, the other
    part learns something else:

    .. math::
        L = \lambda_\mathrm{inh} \, d(E_i(f^S_\mathrm{inh}), F^T)
            - \lambda_\mathrm{exp} \, d(E_e(f^S_\mathrm{exp}), F^T), \qquad
        F^T = \mathrm{sg}\, E_T(f^T)

    with the distances of :func:`kdlayers.functional.inheritance` and
    :func:`~kdlayers.functional.exploration` between factors of one shape. :math:`E_T` is the
    encoder of an auto-encoder that ``kd.fit`` trains on the teacher's maps beforehand; after that
    it is frozen, in eval mode. :math:`E_i, E_e` are trained with the student: give
    :meth:`parameters` to its optimiser. The student's forward does not change, and the exported
    student has none of this.

    The method uses the last feature map, after its ReLU and before pooling. Maps of different size
    are compared on the smaller grid, to which the larger one is average-pooled (our extension).

    Args:
        factor_channels: channels of the factors; default: half the student's channels.
        split: ``"natural"`` (default: the first channels inherit) or ``"random"``, drawn from
            ``seed``. The indices are buffers, so a resumed run keeps its split.
        inherit_ratio: share of the channels that inherits, between 0 and 1. Default 0.5, reported
            as best.
        p: exponent of the distance, 1 (default) or 2.
        measure: ``"norm"`` (default), ``"cosine"`` or ``"cka"``.
        scale: ``"mean"`` (default, as published), or ``"sqrt_dim"``, with which the weights do not
            depend on the size of the maps; start near 1 instead of 50.
        inherit_weight: :math:`\lambda_\mathrm{inh}`, 0 or more. Default 50, reported as best.
        explore_weight: :math:`\lambda_\mathrm{exp}`, 0 or more. Default 50, reported as best.
        host: ``"factor"`` (default), or ``"attention"`` (our extension), which compares the
            attention maps of :class:`~kdlayers.losses.AttentionTransferLoss` instead of factors and
            needs no encoders and no fit.
        coder: ``"fitted"`` (default), or ``"online"`` for mutual learning. There the peer keeps
            changing, so its auto-encoder is trained along with the student, by the reconstruction
            loss with weight 1. We know no code by the authors for this form; it is a reconstruction
            from the abstract.
        reconstruction: loss of the auto-encoder: ``"l1"`` (default, as in the authors' code) or
            ``"l2"``, the squared error that the paper writes.
        epochs: passes over the data in ``kd.fit``. Default 30, as in the authors' code.
        fit_lr: constant learning rate of the auto-encoder. Default 0.1, as in the authors' code.
        seed: seed of the random split. Default 0.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`. ``weight`` is
            multiplied by the two weights above; :func:`kdlayers.attach_kd` needs ``at``.

    :meth:`metrics` returns the two terms without their weights, as ``inheritance`` and
    ``exploration``, because with equal weights their sum is near 0 and uninformative.

    Raises:
        ArgumentError: if an option or number is out of range.
        ArgumentTypeError: if a number has another type.
        NotFittedError: at the call, before the auto-encoder has been fitted.
        ShapeError: at the call, if the tensors are not maps ``[B, C, H, W]`` of one batch, or the
            channels differ from those at the first call; with ``host="attention"`` also for maps
            of one position, and with ``measure="cka"`` for fewer than 3 samples.

    Differences from the authors' code: it calls the trained network teacher and the frozen one
    student; the names here are the paper's. The decoders of the student's halves are left out,
    because they take part in no loss. The teacher's factor is detached, which changes no gradient.
    Losses and gradients agree with an independent re-implementation of that code.

    Example:
        >>> import torch
        >>> loss = InheritExploreLoss(host="attention", at="layer4")
        >>> value = loss(torch.rand(2, 8, 4, 4), torch.rand(2, 16, 4, 4))
        >>> sorted(loss.metrics())
        ['exploration', 'inheritance']
    """

    detaches_teacher: ClassVar[bool] = True
    metric_names = ("inheritance", "exploration", "reconstruction")
    split: Split
    measure: Measure
    scale: Scale
    host: Host
    coder: Learning
    reconstruction: Reconstruction
    inherit_channels: Tensor | None
    explore_channels: Tensor | None
    inherit_encoder: Coder | None
    explore_encoder: Coder | None
    auto_encoder: AutoEncoder | None
    is_fitted: Tensor

    def __init__(
        self,
        *,
        factor_channels: int | None = None,
        split: Split = "natural",
        inherit_ratio: float = 0.5,
        p: int = 1,
        measure: Measure = "norm",
        scale: Scale = "mean",
        inherit_weight: float = 50.0,
        explore_weight: float = 50.0,
        host: Host = "factor",
        coder: Learning = "fitted",
        reconstruction: Reconstruction = "l1",
        epochs: int = 30,
        fit_lr: float = 0.1,
        seed: int = 0,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        check_measure(p, measure, scale)
        check.one_of("split", split, get_args(Split))
        check.one_of("host", host, get_args(Host))
        check.one_of("coder", coder, get_args(Learning))
        check.one_of("reconstruction", reconstruction, get_args(Reconstruction))
        inherit_weight = check.not_negative("inherit_weight", inherit_weight)
        explore_weight = check.not_negative("explore_weight", explore_weight)
        inherit_ratio = check.positive("inherit_ratio", inherit_ratio)
        if inherit_ratio >= 1:
            raise ArgumentError(
                f"inherit_ratio must be below 1, so that channels are left to explore, got "
                f"{inherit_ratio}"
            )
        for key, value in (("factor_channels", factor_channels), ("epochs", epochs)):
            if value is not None:
                check.count(key, value)
        fit_lr = check.positive("fit_lr", fit_lr)
        self.factor_channels = factor_channels
        self.split, self.inherit_ratio = split, inherit_ratio
        self.seed = check.integer("seed", seed)
        self.p, self.measure, self.scale = p, measure, scale
        self.inherit_weight, self.explore_weight = inherit_weight, explore_weight
        self.host, self.coder, self.reconstruction = host, coder, reconstruction
        self.epochs, self.fit_lr = epochs, fit_lr
        for part in ("inherit_encoder", "explore_encoder", "auto_encoder"):
            self.register_module(part, None)
        self.register_buffer("inherit_channels", None)
        self.register_buffer("explore_channels", None)
        self._is_fitted = host == "attention" or coder == "online"
        # A copy for the state dict, because reading it in a step would wait for the device.
        self.register_buffer("is_fitted", torch.tensor(self._is_fitted))

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Split the student's channels, and make the encoders for both networks' channels."""
        check_maps(student, teacher)
        if self.inherit_channels is None:
            self._split_channels(student.shape[1], student.device)
        if self.host == "attention":
            check_positions(student, teacher, self)
        if self.host == "attention" or self.inherit_encoder is not None:
            return
        dtype = work_dtype(student)
        factor = self.factor_channels or max(1, student.shape[1] // 2)
        if self.auto_encoder is None:
            self._hold(AutoEncoder(teacher.shape[1], factor).to(student.device, dtype))
        inherits = self._inherits(student.shape[1])
        self.inherit_encoder = Coder(inherits, factor).to(student.device, dtype)
        self.explore_encoder = Coder(student.shape[1] - inherits, factor).to(student.device, dtype)
        self.train(self.training)

    def _inherits(self, channels: int) -> int:
        # Rounded first: 0.29 * 100 is 28.999999999999996, and int() alone would lose a channel.
        count = int(round(channels * self.inherit_ratio, 6))
        if not 0 < count < channels:
            raise ShapeError(
                f"inherit_ratio={self.inherit_ratio} of {channels} student channels leaves "
                f"{count} to inherit and {channels - count} to explore; each needs one or more"
            )
        return count

    def _split_channels(self, channels: int, device: torch.device) -> None:
        order = torch.arange(channels, device="cpu")
        if self.split == "random":
            draw = torch.Generator().manual_seed(self.seed)
            order = torch.randperm(channels, generator=draw, device="cpu")
        parts = order.split([self._inherits(channels), channels - self._inherits(channels)])
        self.inherit_channels, self.explore_channels = (part.to(device) for part in parts)

    def _hold(self, coder: AutoEncoder) -> None:
        if self.coder == "fitted":
            freeze(coder.eval())
        self.auto_encoder = coder

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the encoders; the teacher's fitted one stays in eval mode."""
        super().train(mode)
        if self.auto_encoder is not None and self.coder == "fitted":
            self.auto_encoder.eval()
        return self

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The two weighted terms for maps ``[B, C, H, W]``; the labels are not used."""
        self.build(student, teacher)
        self._check_use(student, teacher)
        student, teacher = on_one_grid(student, teacher.detach())
        inherits, explores, theirs = self._factors(student, teacher)
        error = self._learn_along(teacher, theirs)
        theirs = theirs.detach()
        near = inheritance(inherits, theirs, p=self.p, measure=self.measure, scale=self.scale)
        far = exploration(explores, theirs, p=self.p, measure=self.measure, scale=self.scale)
        self._record(inheritance=near, exploration=far, **error)
        value = self.inherit_weight * near + self.explore_weight * far
        return value + sum(error.values())

    def _factors(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inherits = student.index_select(1, _made(self.inherit_channels))
        explores = student.index_select(1, _made(self.explore_channels))
        if self.host == "attention":
            return attention(inherits), attention(explores), attention(teacher)
        with torch.set_grad_enabled(self.coder == "online" and torch.is_grad_enabled()):
            theirs = _made(self.auto_encoder).encoder(teacher)
        return _made(self.inherit_encoder)(inherits), _made(self.explore_encoder)(explores), theirs

    def _learn_along(self, teacher: Tensor, factor: Tensor) -> dict[str, Tensor]:
        """The reconstruction loss of an auto-encoder that is trained along with the student."""
        if self.coder == "fitted" or self.host == "attention":
            return {}
        maps = teacher.to(factor.dtype)
        with torch.autocast(teacher.device.type, enabled=False):
            rebuilt = _made(self.auto_encoder).decoder(factor)
            error = reconstruction_error(rebuilt, maps, 1 if self.reconstruction == "l1" else 2)
        return {"reconstruction": error}

    def _check_use(self, student: Tensor, teacher: Tensor) -> None:
        inherit, explore = _made(self.inherit_channels), _made(self.explore_channels)
        ours = len(inherit) + len(explore)
        theirs = teacher.shape[1] if self.auto_encoder is None else self.auto_encoder.channels
        if (student.shape[1], teacher.shape[1]) != (ours, theirs):
            raise ShapeError(
                f"this InheritExploreLoss was made for {ours} student and {theirs} teacher channels"
                f", got {check.shape(student)} and {check.shape(teacher)}; use one loss per point"
            )
        if not self._is_fitted:
            raise NotFittedError(
                "InheritExploreLoss needs an auto-encoder of the teacher's features: call "
                "kd.fit(loader) before training; without attach_kd, call loss.fit(batches)"
            )
        height, width = map(min, student.shape[2:], teacher.shape[2:])
        if self.host == "factor" and self.training and len(student) * height * width == 1:
            raise ShapeError(
                "one image with a 1x1 map has no batch statistics; use drop_last=True in the "
                "loader, or a point with larger maps"
            )

    def fitter(self, *, seed: int = 0) -> Fitter | None:
        """The fitter of the auto-encoder; ``None`` if there is nothing to fit."""
        if self.host == "attention" or self.coder == "online":
            return None
        return AutoEncoderFitter(
            self._fresh_coder,
            self._take,
            epochs=self.epochs,
            power=1 if self.reconstruction == "l1" else 2,
            lr=self.fit_lr,
            seed=seed,
        )

    def _fresh_coder(self, teacher: Tensor) -> AutoEncoder:
        if self.auto_encoder is not None:
            held = self.auto_encoder
            return AutoEncoder(held.channels, held.factor_channels).to(held.weight)
        if self.factor_channels is None:
            raise ArgumentError(
                "the number of factor channels is not known yet: give factor_channels=, or call "
                "build(student_maps, teacher_maps) first, as attach_kd does"
            )
        made = AutoEncoder(teacher.shape[1], self.factor_channels)
        return made.to(teacher.device, work_dtype(teacher))

    def _take(self, coder: AutoEncoder) -> None:
        self._hold(coder)
        self.is_fitted = torch.ones_like(self.is_fitted)
        self._is_fitted = True

    def fit(self, batches: Iterable[tuple[Tensor, Tensor | None]], *, seed: int = 0) -> Self:
        """Train the auto-encoder without :func:`kdlayers.attach_kd`.

        Args:
            batches: pairs (teacher maps ``[B, C, H, W]``, anything), which can be iterated again.
            seed: seed of the initial weights. Default 0.

        Returns:
            The loss itself.

        Raises:
            ArgumentError: if neither ``factor_channels`` was given nor :meth:`build` called.
            ArgumentTypeError: if ``batches`` does not give pairs.
            FitError: if there is no batch, or the reconstruction loss is not finite.
        """
        fitter = self.fitter(seed=check.integer("seed", seed))
        if fitter is not None:
            fit_rows(fitter, batches)
        return self

    @property
    def fitted(self) -> bool:
        """Whether the auto-encoder has been fitted; True if there is none to fit."""
        return self._is_fitted

    def _build_from(self, state: dict[str, Tensor]) -> None:
        for key in ("inherit_channels", "explore_channels"):
            if getattr(self, key) is None and key in state:
                setattr(self, key, state[key].clone())
        for key in ("inherit_encoder", "explore_encoder"):
            saved = state.get(f"{key}.4.weight")  # the convolution from in to out
            if getattr(self, key) is None and saved is not None:
                setattr(self, key, Coder(saved.shape[1], saved.shape[0]).to(saved))
        saved = state.get("auto_encoder.encoder.4.weight")
        if self.auto_encoder is None and saved is not None:
            self._hold(AutoEncoder(saved.shape[1], saved.shape[0]).to(saved))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        keys = prefix + "inherit_channels", prefix + "explore_channels"
        parts = [state_dict[key] for key in keys if key in state_dict]
        if len(parts) == 2 and all(isinstance(part, Tensor) and part.dim() == 1 for part in parts):
            order = torch.cat(parts).sort().values
            if not torch.equal(order, torch.arange(len(order), device=order.device).to(order)):
                raise CheckpointError(
                    "the state of InheritExploreLoss is damaged: inherit_channels and "
                    "explore_channels do not hold every channel once"
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._is_fitted = bool(self.is_fitted)

    def extra_repr(self) -> str:
        """Show the options that decide what is compared, then weight and at."""
        options = f"host={self.host!r}, measure={self.measure!r}, p={self.p}, split={self.split!r}"
        weights = f"inherit_weight={self.inherit_weight}, explore_weight={self.explore_weight}"
        return f"{options}, {weights}, {super().extra_repr()}"


def _made(part: Made | None) -> Made:
    if part is None:
        raise NotFittedError("InheritExploreLoss has no encoders yet; call build() first")
    return part
