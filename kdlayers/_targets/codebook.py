"""Codebook targets: soft assignment of the teacher's features to k-means centres."""

from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from kdlayers._targets.base import TemplateTargets, check_features, check_shapes, check_templates
from kdlayers._targets.codebook_fit import SamplePass
from kdlayers._targets.distances import closeness, one_hot_of_largest
from kdlayers._targets.divergence import codebook_divergence, needs_grad
from kdlayers._targets.fitter import Fitter
from kdlayers._targets.rows import RowFitter
from kdlayers.errors import CheckpointError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import work_dtype


class CodebookTargets(TemplateTargets):
    r"""Soft assignment of the teacher's features at each position to k-means centres.

    .. math:: q_{ik} = \operatorname{softmax}_k\big( -s \, \| f_i - E_k \|^2 \big)

    where :math:`f_i \in \mathbb{R}^D` is the teacher's feature vector at position :math:`i` and
    :math:`E \in \mathbb{R}^{K \times D}` are the centres. Labels are not needed.

    The sharpness :math:`s` multiplies the distances: larger values bring the assignment closer to
    one-hot. (The authors' code calls it a temperature, but it is an inverse temperature.) With the
    default 1 and features of a CIFAR network, most assignments are close to one-hot.

    :meth:`fit` keeps a uniform sample of the data: 256 rows for each template, and at least 16384
    in all. If the sample fits into 2\ :sup:`28` numbers, the data are read once. Otherwise the
    sample has fewer rows (at least 16 for each template), and the data are read again for one exact
    Lloyd step over all rows. k-means on the sample is initialised by greedy k-means++, or by
    k-means++ in rounds for more than 512 templates. With up to 64 templates, it iterates until
    nothing changes (at most 300 times). With more templates, it iterates over growing parts of the
    sample until an iteration lowers the inertia by less than 0.1 %; wide rows are first projected
    on their principal axes. Centres without rows move to the farthest rows.

    Under ``torch.distributed``, the samples, sums and counts of all ranks are combined, and all
    ranks get the same centres.

    Args:
        num_templates: K, number of centres. Default 4096, as in the authors' code.
        sharpness: s, above 0. Default 1, as in the authors' code. ``None``: one-hot assignment to
            the nearest centre.

    Attributes:
        centers: E, ``[K, D]``, float32 (float64 for float64 features), on the features' device;
            ``None`` before :meth:`fit`.
        counts: number of rows assigned to each centre, ``[K]``, for reports; rows of the sample if
            the data were read once, else all rows.
        inertia: mean squared distance of these rows to their centres, a scalar, for reports.

    Raises:
        ArgumentError: if ``num_templates`` or ``sharpness`` is out of range.
        ArgumentTypeError: if one of them is not a number.

    References:
        H. Jain, S. Gidaris, N. Komodakis, P. Pérez, M. Cord, "QuEST: Quantized Embedding Space for
        Transferring Knowledge", ECCV 2020; A. Gorgun, Y. Z. Gurbuz, A. A. Alatan, "Knowledge
        Distillation Layer that Lets the Student Decide", BMVC 2023. The assignment was checked
        against the authors' code. That code starts from random rows and runs faiss for 20
        iterations on all features in memory.

    Example:
        >>> import torch
        >>> from kdlayers import CodebookTargets
        >>> features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [8.0, 0.0], [8.0, 2.0]])
        >>> targets = CodebookTargets(2, sharpness=0.1).fit([(features, None)])
        >>> targets.centers[targets.centers[:, 0].argsort()]
        tensor([[0., 1.],
                [8., 1.]])
        >>> targets.soft_assignment(torch.tensor([[4.0, 1.0]]))
        tensor([[0.5000, 0.5000]])
    """

    counts: Tensor | None
    inertia: Tensor | None
    _state_names: ClassVar[tuple[str, ...]] = ("centers", "counts", "inertia")

    def __init__(self, num_templates: int = 4096, *, sharpness: float | None = 1.0) -> None:
        super().__init__()
        self._num_templates = check.count("num_templates", num_templates)
        if sharpness is not None:
            sharpness = check.positive("sharpness", sharpness)
        self.sharpness = sharpness

    @property
    @override
    def num_templates(self) -> int:
        """K, the number of centres."""
        return self._num_templates

    @property
    @override
    def num_features(self) -> int | None:
        """D, the width of the centres; ``None`` before :meth:`fit`."""
        return None if self.centers is None else self.centers.shape[1]

    @override
    def fitter(self, *, seed: int = 0) -> Fitter:
        return RowFitter(SamplePass(self.num_templates, seed, self._install))

    @override
    @torch.no_grad()
    def soft_assignment(self, features: Tensor, labels: Tensor | None = None) -> Tensor:
        r"""Probabilities of the K centres at every position.

        Computed outside autocast, in float64 if the features or the centres are float64, else in
        full float32.

        Args:
            features: ``[..., D]``, the channels last.
            labels: ignored.

        Returns:
            ``[..., K]``, 0 or more, rows summing to 1, without gradient. A row with NaN or infinite
            features holds NaN.

        Raises:
            NotFittedError: before :meth:`fit`.
            ShapeError: if the last axis is not D wide.
        """
        centers = self.centers
        if centers is None:
            raise self._not_fitted()
        check_features(features, centers.shape[1])
        dtype = work_dtype(features, centers)
        with torch.autocast(features.device.type, enabled=False):
            rows = features.reshape(-1, features.shape[-1]).to(dtype)
            scores = closeness(rows, centers.to(dtype))
            if self.sharpness is None:
                assigned = one_hot_of_largest(scores)
            else:
                assigned = scores.mul_(2 * self.sharpness).softmax(dim=-1)
        return assigned.reshape(*features.shape[:-1], len(centers))

    @override
    def _fused(
        self, student: Tensor, features: Tensor, labels: Tensor | None, templates: Tensor | None
    ) -> Tensor:
        centers = self.centers
        if centers is None:
            raise self._not_fitted()
        check_features(features, centers.shape[1])
        check_templates(student.shape[-1] if templates is None else len(templates), len(centers))
        dtype = work_dtype(features, centers)
        rows = features.reshape(-1, features.shape[-1]).to(dtype)
        value: Tensor = codebook_divergence(
            student.reshape(-1, student.shape[-1]),
            templates,
            rows.detach(),
            centers.to(dtype),
            self.sharpness,
            needs_grad(student, templates),
        )[0]
        return value

    @override
    def _check_state(self, state: dict[str, Tensor]) -> None:
        centers = state["centers"]
        if centers.dim() != 2 or 0 in centers.shape or not centers.is_floating_point():
            raise CheckpointError(
                "the state of CodebookTargets is damaged: centers must be a float tensor "
                f"[templates, channels], got {centers.dtype} {list(centers.shape)}"
            )
        check_shapes(self, state, {"counts": (len(centers),), "inertia": ()})
        self._num_templates = len(centers)

    @override
    def extra_repr(self) -> str:
        return f"{self.num_templates}, sharpness={self.sharpness}, fitted={self.fitted}"
