"""Base class of the template targets: fitting, divergence, state and checks."""

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlayers._targets.fitter import Fitter, fit_rows
from kdlayers._utils import chunks
from kdlayers._utils.plain_tensors import finite, why_not_plain
from kdlayers._utils.torch_internals import in_transform
from kdlayers.errors import CheckpointError, NotFittedError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional import template_kl


class TemplateTargets(nn.Module):
    """Base class: turns the teacher's features into soft assignments to K templates.

    The module has no parameters. Its buffers are ``None``, and not in ``state_dict()``, until
    :meth:`fit` or ``load_state_dict`` fills them. Loading takes their sizes from the state. Use
    :class:`~kdlayers.CodebookTargets` or :class:`~kdlayers.DecisionTargets`.
    """

    centers: Tensor | None
    _fusible: ClassVar[bool] = False
    """Whether `_fused` computes the divergence from the same `soft_assignment`."""
    _state_names: ClassVar[tuple[str, ...]] = ()
    _anchor: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Keeps track of the device if an unfitted module is moved.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)
        for name in self._state_names:
            self.register_buffer(name, None)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "soft_assignment" in vars(cls):  # a user's subclass may change the assignment
            cls._fusible = "_fused" in vars(cls)

    @property
    def fitted(self) -> bool:
        """Whether :meth:`fit` or ``load_state_dict`` has filled the buffers."""
        return self.centers is not None

    @property
    def num_templates(self) -> int | None:
        """K, or None if it depends on data and :meth:`fit` has not run yet."""
        raise NotImplementedError

    @property
    def num_features(self) -> int | None:
        """D, the channels of the teacher's features; None before :meth:`fit`."""
        return None

    def fit(self, batches: Iterable[tuple[Tensor, Tensor | None]], *, seed: int = 0) -> Self:
        """Learn from ``batches`` in a few passes, without storing all features.

        Args:
            batches: an iterable of (features ``[..., D]``, labels) that can be iterated several
                times, such as a list. Labels are integers of shape ``[...]``, one for each
                position, or ``[B]``, one for each image of ``[B, H, W, D]``, or ``None`` if they
                are not needed.
            seed: seed of sampling and clustering, default 0. The global random state is neither
                read nor changed. The same rows and seed give the same result for any batch size.

        Returns:
            The targets themselves. They do not change if fitting fails.

        Raises:
            FitError: if the data cannot be learnt from.
            ArgumentTypeError: if ``batches`` does not give pairs.
            ShapeError: if the widths of batches differ, or labels do not match the features.
        """
        fit_rows(self.fitter(seed=check.integer("seed", seed)), batches)
        return self

    def fitter(self, *, seed: int = 0) -> Fitter:
        """The object that learns these targets in passes over the data; :meth:`fit` runs it."""
        raise NotImplementedError

    def soft_assignment(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        """Probabilities ``[..., K]`` for features ``[..., D]``, without gradient."""
        raise NotImplementedError

    def divergence(
        self,
        student: Tensor,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        templates: Tensor | None = None,
    ) -> Tensor:
        """Mean KL divergence of template scores from :meth:`soft_assignment`, a scalar.

        Args:
            student: scores ``[..., K]``; with ``templates``, unit vectors ``[..., C]``.
            features: the teacher's features, ``[..., D]``.
            labels: as for :meth:`soft_assignment`.
            templates: ``[K, C]``; the scores are their products with the unit vectors.

        Raises:
            ShapeError: if the number of scores differs from the number of templates, or student and
                features do not have the same positions.
        """
        check_features(features)
        if student.shape[:-1] != features.shape[:-1]:
            raise ShapeError(
                "scores [..., templates] and features [..., channels] must have the same "
                f"positions, got {check.shape(student)} and {check.shape(features)}"
            )
        if self._fusible and _fuses(student, templates):
            return self._fused(student, features, labels, templates)
        return divergence_from(self.soft_assignment(features, labels), student, templates)

    def _fused(
        self, student: Tensor, features: Tensor, labels: Tensor | None, templates: Tensor | None
    ) -> Tensor:
        """:meth:`divergence` without storing the assignment or the scores of all positions."""
        raise NotImplementedError

    def _not_fitted(self) -> NotFittedError:
        return NotFittedError(
            f"{type(self).__name__} is not fitted yet; call kd.fit(loader) "
            "or .fit(batches) first, or load a fitted state"
        )

    def _install(self, **buffers: Tensor) -> None:
        for name, value in buffers.items():
            setattr(self, name, value)
        self._anchor = buffers["centers"].new_empty(0)

    def _check_state(self, state: dict[str, Tensor]) -> None:
        """Raise CheckpointError unless the tensors match; set the sizes that they imply."""
        raise NotImplementedError

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        state = {n: state_dict[prefix + n] for n in self._state_names if prefix + n in state_dict}
        if state:
            self._check_values(state)
            self._check_state(state)
        for name, value in state.items():
            current = getattr(self, name)
            if current is None or current.shape != value.shape:
                # Buffers of the right size; super() copies the values into them.
                dtype = value.dtype if current is None else current.dtype
                setattr(
                    self, name, torch.empty_like(value, dtype=dtype, device=self._anchor.device)
                )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _check_values(self, state: dict[str, Any]) -> None:
        owner = type(self).__name__
        missing = [name for name in self._state_names if name not in state]
        if missing:
            raise CheckpointError(
                f"the state of {owner} is incomplete: it has {', '.join(state)}, but not "
                f"{', '.join(missing)}; save state_dict() as a whole"
            )
        for name, value in state.items():
            why = why_not_plain(value)
            if why is None and value.is_complex():
                why = "has complex values"
            if why is None and name != "counts" and not value.is_floating_point():
                why = f"must be a float tensor, got {value.dtype}"
            if why is None and not finite(value):
                why = "has NaN or infinite values"
            if why is None and name in ("counts", "inertia") and (value < 0).any():
                why = "has negative values"
            if why is not None:
                raise CheckpointError(f"the state of {owner} is damaged: {name} {why}")


def _fuses(student: Tensor, templates: Tensor | None) -> bool:
    """Whether the fused operators accept these tensors, and are faster."""
    usable = student.is_floating_point() and student.numel() > 0
    if not usable or student.device.type not in chunks.DEVICES:
        return False
    if templates is None:
        wanted = student.numel() >= chunks.LEAST_SCORES
    else:
        wanted = templates.dtype == student.dtype
    return wanted and not in_transform()


def divergence_from(assignment: Tensor, student: Tensor, templates: Tensor | None) -> Tensor:
    """Mean KL divergence of the scores from the teacher's assignment ``[..., K]``."""
    scores = student if templates is None else student @ templates.T
    if scores.shape[-1] != assignment.shape[-1]:
        check_templates(scores.shape[-1], assignment.shape[-1])
    return template_kl(scores, assignment)


def check_templates(scored: int, wanted: int) -> None:
    """Raise ShapeError unless the KD layer scores as many templates as the targets have."""
    if scored != wanted:
        raise ShapeError(
            f"the KD layer has {scored} templates, but the targets have {wanted}; create the "
            f"layer with num_templates={wanted}"
        )


def check_shapes(
    owner: object, state: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError if a tensor of the state has an unexpected shape."""
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise CheckpointError(
                f"the state of {type(owner).__name__} is damaged: {name} has shape "
                f"{list(state[name].shape)}, but the other tensors require {list(shape)}"
            )


def check_features(features: object, width: int | None = None) -> None:
    """Raise unless ``features`` is a float tensor [..., D], with D = ``width`` if given."""
    found = check.floats("features", features)
    if found.dim() == 0 or found.shape[-1] == 0:
        raise ShapeError(f"features must be [..., D] with D > 0, got {check.shape(found)}")
    if width is not None and found.shape[-1] != width:
        raise ShapeError(
            f"features must be [..., {width}], as at fit, got {check.shape(found)}; the channels "
            "are the last axis: for maps [B, C, H, W] use .movedim(1, -1)"
        )
