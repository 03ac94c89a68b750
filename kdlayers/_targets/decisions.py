"""Decision targets: how the teacher's features confuse sub-classes."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kdlayers._targets.base import (
    TemplateTargets,
    check_features,
    check_shapes,
    check_templates,
)
from kdlayers._targets.decision_fit import COMPONENTS, Plan, ScatterPass
from kdlayers._targets.distances import affine, mixed_rows, own_subclass, rows_of
from kdlayers._targets.divergence import decision_divergence, needs_grad
from kdlayers._targets.fitter import Fitter
from kdlayers._targets.labels import hard_labels, soft_labels
from kdlayers._targets.rows import RowFitter
from kdlayers.errors import ArgumentError, CheckpointError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import work_dtype
from kdlayers.functional._mixed import is_mixed


class DecisionTargets(TemplateTargets):
    r"""The teacher's decisions among sub-classes, for the sub-class of each position.

    Linear discriminant analysis projects the features, :math:`z = A f + b`, and k-means splits each
    class :math:`c` into :math:`S` sub-classes with centres :math:`\rho_{Sc},\dots,
    \rho_{Sc+S-1}` and means :math:`\mu`. A position of class :math:`y` belongs to the nearest
    centre of its own class. Its decision is the nearest of all :math:`K = CS` means of all classes:

    .. math::
        h_1(z, y) = \operatorname*{argmin}_{s \in \{Sy, \dots, Sy+S-1\}} \| z - \rho_s \|^2,
        \qquad h_2(z) = \operatorname*{argmin}_s \| z - \mu_s \|^2

    .. math::
        P_{ss'} = \frac{\#\{ i : h_1(z_i, y_i) = s,\; h_2(z_i) = s' \}}
        {\#\{ i : h_1(z_i, y_i) = s \}},
        \qquad q_i = P_{h_1(z_i, y_i),\,\cdot}

    :math:`P` holds relative counts, without softmax or temperature. Exact zeros are common.

    Labels of mixup, CutMix and label smoothing are class probabilities :math:`y_{ic}`. The
    assignment is then the weighted mean over a set :math:`M_i` of classes:

    .. math::
        q_i = \frac{\sum_{c \in M_i} y_{ic} \, P_{h_1(z_i, c),\,\cdot}}
        {\sum_{c \in M_i} y_{ic}}

    :math:`M_i` are the classes whose labels exceed the uniform part that smoothing adds,
    :math:`\epsilon / C`. This part is the smallest label of a row if more than half of the classes
    share it. One-hot rows give exactly the assignment of the class. The extension to such labels is
    ours.

    :meth:`fit` needs integer labels. It reads the data two to four times:

    1. for the class statistics of the discriminant analysis (in float64; class frequencies as
       priors, covariance within classes with divisor :math:`N - C`, tolerance 1e-4);
    2. for the sample that k-means clusters: 256 rows for each sub-class and at least 2048 for each
       class (fewer with very many classes);
    3. for the means :math:`\mu`;
    4. for the table.

    If the sample holds all rows, the last two steps use the sample. An empty sub-class keeps its
    centre as its mean, and its row of the table is one-hot at itself. Under ``torch.distributed``,
    all ranks get the same result.

    Args:
        subclasses: S, sub-classes of each class. Default 8, as in the authors' code; 1 is allowed.
        components: number of discriminant directions, at most C - 1 and at most D. Default 60, the
            authors' value for CIFAR-100, or all directions if there are fewer. If you pass a larger
            number than there are directions, all are used, with a warning.
        num_classes: C. Default: the number of classes that ``attach_kd`` finds, or the largest
            label + 1.
        ignore_index: label of positions that the fit and the loss ignore, such as 255 in
            segmentation masks; the loss is the mean over the others. Default: none.

    Attributes:
        projection: A, ``[components, D]``, with ``z = features @ projection.T + shift``.
        shift: b, ``[components]``.
        centers: :math:`\rho`, ``[K, components]``; the sub-classes of class c are the rows
            ``subclasses * c`` to ``subclasses * c + subclasses - 1``.
        prototypes: :math:`\mu`, ``[K, components]``.
        decisions: P, ``[K, K]``, rows summing to 1.
        counts: number of rows in each sub-class, ``[C, subclasses]``, for reports.

    All attributes are ``None`` before :meth:`fit`. Then they are float32 (float64 for float64
    features) and on the features' device.

    Raises:
        ArgumentError: if an argument is too small.
        ArgumentTypeError: if an argument is not an integer.

    References:
        A. Gorgun, Y. Z. Gurbuz, A. A. Alatan, "Knowledge Distillation Layer that Lets the Student
        Decide", BMVC 2023. The results were checked against the authors' code, except for three
        errors of that code. With one sub-class for each class, a position far from its centre can
        get sub-class 0. The table omits the last rows unless the number of rows is a multiple of
        10000. An empty sub-class shifts the indices of later ones.

    Example:
        >>> import torch
        >>> from kdlayers import DecisionTargets
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0], [5.0, 1.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> targets = DecisionTargets(subclasses=1, components=1).fit([(features, labels)])
        >>> targets.soft_assignment(features, labels)
        tensor([[1., 0.],
                [1., 0.],
                [0., 1.],
                [0., 1.]])
    """

    projection: Tensor | None
    shift: Tensor | None
    prototypes: Tensor | None
    decisions: Tensor | None
    counts: Tensor | None
    _num_classes: int | None
    _state_names: ClassVar[tuple[str, ...]] = (
        "projection",
        "shift",
        "centers",
        "prototypes",
        "decisions",
        "counts",
    )

    def __init__(
        self,
        subclasses: int = 8,
        *,
        components: int = COMPONENTS,
        num_classes: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        self.subclasses = check.count("subclasses", subclasses)
        self.components = check.count("components", components)
        self.num_classes = num_classes
        if ignore_index is not None:
            ignore_index = check.integer("ignore_index", ignore_index)
        self.ignore_index = ignore_index

    @property
    def num_classes(self) -> int | None:
        """C; ``None`` if it was not given and :meth:`fit` has not run yet."""
        return self._num_classes

    @num_classes.setter
    def num_classes(self, value: int | None) -> None:
        if value is not None:
            value = check.count("num_classes", value, least=2)
        if self.fitted and value != self._num_classes:
            raise ArgumentError(
                f"these targets are fitted to {self._num_classes} classes; create new "
                f"DecisionTargets(num_classes={value}) and fit them"
            )
        self._num_classes = value

    @property
    @override
    def num_templates(self) -> int | None:
        """K, classes times sub-classes; ``None`` while the number of classes is unknown."""
        return None if self._num_classes is None else self._num_classes * self.subclasses

    @property
    @override
    def num_features(self) -> int | None:
        """D, the width of the features; ``None`` before :meth:`fit`."""
        return None if self.projection is None else self.projection.shape[1]

    @override
    def fitter(self, *, seed: int = 0) -> Fitter:
        plan = Plan(self.subclasses, self.components, self.num_classes, seed, self._install)
        return RowFitter(ScatterPass(plan), self.ignore_index)

    @override
    def _install(self, **buffers: Tensor) -> None:
        super()._install(**buffers)
        self._num_classes, self.subclasses = map(int, buffers["counts"].shape)

    @override
    @torch.no_grad()
    def soft_assignment(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        r"""The row of :attr:`decisions` for the sub-class of every position.

        It is computed outside autocast, in float64 if the features or the projection are float64,
        else in float32.

        Args:
            features: ``[..., D]``, the channels last.
            labels: one of

                - integer classes of shape ``[...]``, one for each position, or ``[B]``, one for
                  each image of features ``[B, H, W, D]``, whose positions all have its label;
                - masks ``[B, H', W']``, which are resized to the grid (nearest pixel);
                - floating-point probabilities with one more axis, such as ``[B, C]``. The cost
                  grows with the largest number of nonzero classes in a row (2 after mixup).
                  Finding them synchronises with the device once.

        Returns:
            ``[..., K]``, rows of :attr:`decisions` or their means, without gradient. If no distance
            of a position is finite, its row begins with NaN. Ignored positions have zeros.

        Raises:
            NotFittedError: before :meth:`fit`.
            ArgumentError: if there are no labels, or a label is negative or out of range (checked
                on the CPU; on an accelerator a label that is too large is an indexing error, and a
                negative one gives NaN).
            ArgumentTypeError: if labels are not a tensor of numbers.
            ShapeError: if the last axis is not D wide, or the labels do not match the positions.
        """
        if self.ignore_index is not None and labels is not None and not is_mixed(labels):
            kept, classes = self._kept(features, labels, self.ignore_index)
            own, _, decisions = self._own(features[kept], classes)
            whole = decisions.new_zeros(*features.shape[:-1], len(decisions))
            whole[kept] = rows_of(decisions, own)
            return whole
        own, shares, decisions = self._own(features, labels)
        rows = rows_of(decisions, own) if shares is None else mixed_rows(decisions, own, shares)
        return rows.reshape(*features.shape[:-1], len(decisions))

    @override
    def divergence(
        self,
        student: Tensor,
        features: Tensor,
        labels: Tensor | None = None,
        *,
        templates: Tensor | None = None,
    ) -> Tensor:
        if self.ignore_index is not None and labels is not None and not is_mixed(labels):
            kept, labels = self._kept(features, labels, self.ignore_index)
            if not len(labels):
                return student.flatten()[:0].sum()  # 0 times an overflow would be NaN
            student, features = student[kept], features[kept]
        return super().divergence(student, features, labels, templates=templates)

    @override
    def _fused(
        self, student: Tensor, features: Tensor, labels: Tensor | None, templates: Tensor | None
    ) -> Tensor:
        own, shares, decisions = self._own(features, labels)
        check_templates(student.shape[-1] if templates is None else len(templates), len(decisions))
        rows, needed = student.reshape(-1, student.shape[-1]), needs_grad(student, templates)
        value: Tensor = decision_divergence(rows, templates, own, decisions, shares, needed)[0]
        return value

    @staticmethod
    def _kept(features: Tensor, labels: Tensor, ignored: int) -> tuple[Tensor, Tensor]:
        """Mask of the labels that are not ``ignored``, ``[...]``, and these labels, ``[n]``."""
        classes = hard_labels(features, labels).to(features.device)
        kept = classes != ignored
        return kept, classes[kept]

    @torch.no_grad()
    def _own(self, features: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """Sub-class of each position ``[N]`` (or several with shares ``[N, m]``), and the table.

        All have the dtype of the computation.
        """
        projection, shift, centers = self.projection, self.shift, self.centers
        decisions = self.decisions
        if projection is None or shift is None or centers is None or decisions is None:
            raise self._not_fitted()
        check_features(features, projection.shape[1])
        where, shares = features.shape[:-1], None
        if (
            isinstance(labels, Tensor)
            and labels.dtype == torch.long
            and labels.dim() == 1
            and labels.shape == where[:1]
        ):
            classes = labels.view(-1, *[1] * (len(where) - 1)).expand(where)  # one an image
        else:
            classes, shares = soft_labels(features, labels, self._num_classes or 0)
        dtype = work_dtype(features, projection)
        with torch.autocast(features.device.type, enabled=False):
            rows = features.reshape(-1, features.shape[-1]).to(dtype)
            z = affine(rows, projection.to(dtype), shift.to(dtype))
            if shares is None:
                classes = classes.to(features.device).reshape(-1)
                check.in_range("labels", classes, self._num_classes or 0)
                own = own_subclass(z, classes, centers.to(dtype), self.subclasses)
                return own, None, decisions.to(dtype)
            classes = classes.to(features.device).reshape(len(z), -1)
            shares = shares.to(features.device, dtype).reshape(len(z), -1)
            each = [
                own_subclass(z, one, centers.to(dtype), self.subclasses)
                for one in classes.unbind(dim=1)
            ]
        return torch.stack(each, dim=1), shares, decisions.to(dtype)

    @override
    def _check_state(self, state: dict[str, Tensor]) -> None:
        projection, counts = state["projection"], state["counts"]
        if projection.dim() != 2 or counts.dim() != 2 or 0 in (*projection.shape, *counts.shape):
            raise CheckpointError(
                "the state of DecisionTargets is damaged: projection must be [components, "
                f"channels] and counts [classes, sub-classes], got {list(projection.shape)} and "
                f"{list(counts.shape)}"
            )
        k, size = counts.numel(), len(projection)
        shapes = {"shift": (size,), "centers": (k, size), "prototypes": (k, size)}
        check_shapes(self, state, {**shapes, "decisions": (k, k)})
        decisions = state["decisions"]
        if not decisions.is_meta:
            sums = decisions.float().sum(dim=1)
            if (decisions < 0).any() or ((sums - 1).abs() > 1e-2).any():
                raise CheckpointError(
                    "the state of DecisionTargets is damaged: the rows of decisions must be "
                    "probabilities"
                )
        self._num_classes, self.subclasses = map(int, counts.shape)

    @override
    def extra_repr(self) -> str:
        return (
            f"{self.subclasses}, components={self.components}, num_classes={self.num_classes}, "
            f"fitted={self.fitted}"
        )
