"""The KD layer of letKD and its first half, the template head."""

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

from kdlayers._layer.batch_norm import as_affine, update_statistics, why_plain
from kdlayers._layer.graphs import enhanced
from kdlayers._layer.recognise import recognise, recognise_frozen
from kdlayers._utils import chunks
from kdlayers._utils.norms import cosines, inverse_norm
from kdlayers._utils.torch_internals import has_hooks, in_transform, plain, runs_forward_of
from kdlayers.errors import ArgumentError, ShapeError
from kdlayers.functional import _checks as check

MEMORY = ("normal", "low")
CHEAP_CHANNELS = 128
"""Up to this many channels, recomputing the scores takes no longer than storing them."""


def worthwhile(rows: int, channels: int, templates: int) -> bool:
    """Whether the fused operators are faster than the plain ones."""
    return rows * templates >= chunks.LEAST_SCORES and templates >= chunks.LEAST_RATIO * channels


class CosineProjection(nn.Module):
    r"""Scaled cosine of every vector with every row of a matrix, over the last axis.

    .. math:: y_o = s \left\langle \frac{M_o}{\max(\lVert M_o\rVert, \epsilon)},
              \frac{u}{\max(\lVert u\rVert, \epsilon)} \right\rangle, \qquad \epsilon = 10^{-12}

    Norms are taken in float32 or better, also under autocast and in half-precision models; the
    matrix product runs in autocast's precision. A zero vector gives zeros and gets no gradient.
    """

    def __init__(self, in_features: int, out_features: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * sqrt(2 / in_features))
        # One element rather than none: FSDP cannot shard a parameter without axes.
        self.scale = nn.Parameter(torch.tensor([float(scale)]))

    def kernels(self) -> Tensor:
        """The rows as unit vectors times the scale, in float32 or better."""
        return self.weight * (inverse_norm(self.weight) * self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """`project`; tools that wrap the module replace this method."""
        return self.project(x)

    def project(self, vectors: Tensor) -> Tensor:
        """Cosines of ``vectors`` [..., in_features] with the rows: [..., out_features]."""
        return cosines(vectors, self.weight, self.scale)


def product_dtype(x: Tensor) -> torch.dtype:
    """Dtype of the factors of matrix products with ``x``: autocast's dtype if it is enabled."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class TemplateHead(CosineProjection):
    r"""Scores of every position against K templates: a cosine 1x1 convolution with a learnt scale.

    .. math:: a_k = s \left\langle \frac{W_k}{\lVert W_k\rVert}, \frac{x}{\lVert x\rVert}
              \right\rangle \in [-s, s]

    Args:
        in_channels: channels C of the features.
        num_templates: number of templates K.
        scale: initial value of the learnable scale s; default 3, as in the authors' code.
        channel_dim: axis of the channels; default 1 (NCHW). Use -1 for NHWC and for tokens.

    Attributes:
        weight: the templates, ``[K, C]``, drawn from N(0, 2/C).
        scale: the learnable scale, ``[1]``.

    Raises:
        ArgumentError: if a size is below 1, the scale is not positive, or ``channel_dim`` is 0.
        ArgumentTypeError: if a size is not an integer or the scale is not a number.
        ShapeError: in ``forward``, if the channels are not ``in_channels``.

    Source: Gorgun, Gurbuz, Alatan, "Knowledge Distillation Layer that Lets the Student Decide",
    BMVC 2023; scale and initialisation checked against the authors' code.

    Example:
        >>> import torch
        >>> from kdlayers import TemplateHead
        >>> TemplateHead(16, 32)(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 32, 7, 7])
    """

    def __init__(
        self, in_channels: int, num_templates: int, *, scale: float = 3.0, channel_dim: int = 1
    ) -> None:
        check.count("in_channels", in_channels)
        check.count("num_templates", num_templates)
        check.positive("scale", scale)
        if channel_dim == 0:
            raise ArgumentError(
                "channel_dim must not be 0, the batch; use 1 (NCHW) or -1 (NHWC, tokens)"
            )
        super().__init__(in_channels, num_templates, scale)
        self.channel_dim = channel_dim

    @property
    def in_channels(self) -> int:
        """Channels C of the features."""
        return self.weight.shape[1]

    @property
    def num_templates(self) -> int:
        """Number of templates K."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Scores with K instead of C: ``[B, C, H, W]`` becomes ``[B, K, H, W]``."""
        return self.project(self.channels_last(x)).movedim(-1, self.channel_dim)

    def channels_last(self, x: Tensor) -> Tensor:
        """``x`` with its channels on the last axis, after checking that they are there."""
        if not is_scripting():  # TorchScript does not support our exceptions
            self._check(x)
        return x.movedim(self.channel_dim, -1)

    def _check(self, x: Tensor) -> None:
        if is_tracing() or not isinstance(x, Tensor):
            return  # sizes are tensors or symbols then, which cannot be compared
        dim = self.channel_dim
        if not -x.dim() <= dim < x.dim() or x.shape[dim] != self.in_channels:
            raise ShapeError(
                f"this layer was made for {self.in_channels} channels on axis {dim}, but got a "
                f"tensor of shape {tuple(x.shape)}; make it with in_channels={_channels(x, dim)}, "
                "or give the axis of the channels as channel_dim (1 for NCHW, -1 for NHWC and "
                "tokens)"
            )

    def extra_repr(self) -> str:
        """Shows the sizes in the printed module."""
        return f"{self.in_channels}, {self.num_templates}, channel_dim={self.channel_dim}"


class LayerParts(nn.Module):
    """The parts of a KD layer and its arithmetic, shared by `KDLayer` and a student's slots."""

    def __init__(
        self,
        in_channels: int,
        num_templates: int,
        *,
        alpha: float = 1.0,
        channel_dim: int = 1,
        memory: str = "normal",
    ) -> None:
        super().__init__()
        check.not_negative("alpha", alpha)
        self.memory = check_memory(memory)
        self.head = TemplateHead(in_channels, num_templates, channel_dim=channel_dim)
        self.norm = nn.BatchNorm1d(num_templates)
        self.value = CosineProjection(num_templates, in_channels, scale=1.0)
        self.alpha = float(alpha)  # also a NumPy number, which files without code cannot hold
        self.channel_dim = channel_dim

    def enhance(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The new features of :meth:`forward`, the scores with K instead of C, and ``None``.

        If the scores are not stored, the last two are unit vectors in the shape of ``x`` and the
        templates ``[K, C]``, whose products are the scores.
        """
        if not is_scripting():
            if not isinstance(x, Tensor):  # torch.fx traces with symbols
                if self.wrapped() is None:
                    return self._as_node(x)
            elif self._may_fuse(x) and self.why_plain(x.device) is None:
                features = self.head.channels_last(x if type(x) is Tensor else plain(x))
                self._need_positions(features)
                if self.fuses(x.device, features[..., 0].numel()):
                    return self._fused(x, features)
                if self.frozen(x.device):
                    return self._at_inference(x, features)
        # Call the modules, so that pruning, weight norm or LoRA around them take effect.
        scores = self.head(x)
        last = scores.movedim(self.channel_dim, -1)
        if not is_scripting():
            self._need_positions(last)
        # Batch norm gets two axes: positions of all images, templates.
        assignment = F.relu(self.norm(last.flatten(0, -2))).view_as(last)
        value = self.value(assignment).movedim(-1, self.channel_dim)
        return x + (self.alpha * value).to(x.dtype), scores, None

    @torch.jit.unused
    def _need_positions(self, features: Tensor) -> None:
        """Raise ShapeError for a training forward of one position, which has no variance."""
        if not isinstance(features, Tensor) or not isinstance(self.norm, nn.BatchNorm1d):
            return  # torch.fx traces with symbols; other norms may sum over all processes
        if self.norm.training and features.numel() == features.shape[-1] and not is_tracing():
            raise ShapeError(
                "a KD layer trains with the statistics of all positions in the batch, but this "
                "batch is one image with one position; give two images or more (drop_last=True in "
                "the DataLoader), larger images, or set the layer's .norm to eval mode"
            )

    def _may_fuse(self, x: Tensor) -> bool:
        """Whether a fused path is possible, before the parts are checked."""
        if self.memory == "low" or not self.training:
            return True
        channels = x.shape[self.channel_dim] if -x.dim() <= self.channel_dim < x.dim() else 1
        rows = x.numel() // max(1, channels)
        return worthwhile(rows, channels, getattr(self.norm, "num_features", 0))

    @torch.jit.unused
    def _as_node(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `enhance`, for a symbol of torch.fx; no loss reads the scores of a traced student."""
        head, value = (self.head.weight, self.head.scale), (self.value.weight, self.value.scale)
        new: Tensor = enhanced(x, head, self.norm, value, self.alpha, self.channel_dim)
        return new, new, None

    @torch.jit.unused
    def _fused(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `enhance`, training with the batch's statistics, without tensors [positions, K]."""
        norm, dtype = self.norm, product_dtype(x)
        units = (features * inverse_norm(features)).to(dtype)
        templates, values = self.head.kernels().to(dtype), self.value.kernels().to(dtype)
        affine = [p.to(torch.promote_types(dtype, torch.float32)) for p in (norm.weight, norm.bias)]
        value, scores, mean, variance, _ = recognise(
            units.flatten(0, -2), templates, *affine, values, norm.eps, self.keeps_scores()
        )
        update_statistics(norm, mean.detach(), variance.detach(), value.shape[0])
        value = value.view_as(features).movedim(-1, self.channel_dim)
        new = x + (self.alpha * value).to(x.dtype)
        if self.keeps_scores():
            scores = scores.view(*features.shape[:-1], -1)
            return new, scores.movedim(-1, self.channel_dim), None
        return new, units.movedim(-1, self.channel_dim), templates

    @torch.jit.unused
    def _at_inference(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `enhance`, with the running statistics, without tensors [positions, K]."""
        norm, dtype = self.norm, product_dtype(x)
        units = (features * inverse_norm(features)).to(dtype)
        templates = self.head.kernels()
        gain, threshold = as_affine(norm)
        matching = (templates * gain.unsqueeze(1)).to(dtype)
        rows = units.flatten(0, -2)
        value = recognise_frozen(rows, matching, threshold, self.value.kernels().to(dtype))
        value = value.view_as(features).movedim(-1, self.channel_dim)
        units = units.movedim(-1, self.channel_dim)
        return x + (self.alpha * value).to(x.dtype), units, templates.to(dtype)

    @torch.jit.unused
    def frozen(self, device: torch.device) -> bool:
        """Whether a forward now can run in chunks: inference, outside `torch.compile`.

        Compilers fuse the plain operations themselves, and derivatives and batches of `torch.func`
        have no rules for products that are written into a part of a tensor.
        """
        evaluating = not (self.training or self.norm.training or torch.is_grad_enabled())
        ready = evaluating and self.why_plain(device) is None
        traced = is_tracing() or torch.compiler.is_compiling()
        return ready and not traced and not in_transform()

    @torch.jit.unused
    def fuses(self, device: torch.device, rows: int) -> bool:
        """Whether a forward would take the fused path now, rather than the plain operations.

        Training forwards of enough positions (``rows``) do, on CPUs and CUDA devices, where head,
        norm and value are as the layer made them; exports, traces and transforms of torch.func see
        the plain operations.
        """
        if not (self.training and self.norm.training) or is_tracing():
            return False
        size = (self.head.in_channels, self.head.num_templates)
        wanted = self.memory == "low" or worthwhile(rows, *size)
        ready = self.why_plain(device) is None and not torch.compiler.is_exporting()
        return wanted and ready and rows > 1 and not in_transform()

    @torch.jit.unused
    def why_plain(self, device: torch.device) -> str | None:
        """The reason why the layer must use the plain operations; None if there is none."""
        wrapped = self.wrapped()
        return why_plain(self.norm, device) if wrapped is None else wrapped

    @torch.jit.unused
    def wrapped(self) -> str | None:
        """What modifies the layer's parameters, such as pruning; None if nothing does."""
        for name, part in (("head", self.head), ("value", self.value)):
            if has_hooks(part):
                return f"hooks on its {name}"
            stock = TemplateHead if name == "head" else CosineProjection
            if not runs_forward_of(part, stock):
                return f"its {name} wrapped in {type(part).__name__}"
        return None

    @torch.jit.unused
    def keeps_scores(self) -> bool:
        """Whether the fused path keeps the scores of all positions for the backward pass."""
        return self.memory == "normal" and self.head.in_channels > CHEAP_CHANNELS

    def extra_repr(self) -> str:
        """Shows alpha in the printed module."""
        return f"alpha={self.alpha}"


class KDLayer(LayerParts):
    r"""Learnable KD layer: adds what its templates recognise to the features.

    .. math::
        a &= \operatorname{cos}(x; W, s_t) \qquad&
        p &= \operatorname{ReLU}(\operatorname{BN}(a)) \\
        v &= \operatorname{cos}(p; V, s_v) \qquad&
        \hat x &= x + \alpha v

    where :math:`\operatorname{cos}` is the scaled cosine of :class:`TemplateHead`: x is normalised
    over its channels, p over the templates, each template over C, and V over K for each output
    channel. A position with p = 0 passes unchanged. The template loss acts on the scores a.
    The layer stays in the student at inference: 2KC + 2K + 2 parameters, 2KC multiply-adds per
    position.

    Args:
        in_channels: channels C of the features.
        num_templates: number of templates K.
        alpha: value ratio, the factor of v; default 1, as in all but one of the authors'
            configurations. 0 keeps the features as they are (the loss still acts on the scores).
        channel_dim: axis of the channels; default 1 (NCHW). Use -1 for NHWC and for tokens.
        memory: ``"low"``: in training, never store the scores of all positions but recompute them
            in chunks. ``"normal"`` (default): recompute them only where that costs no extra time,
            which is up to 128 channels, from 4 templates per channel and 524,288 scores. The
            numbers are the same.

    Attributes:
        head: the :class:`TemplateHead`, ``weight [K, C]`` and ``scale`` (initially 3).
        norm: batch norm over the K scores (eps 1e-5, momentum 0.1).
        value: ``weight [C, K]``, drawn from N(0, 2/K), and ``scale`` (initially 1).

    Raises:
        ArgumentError: if a size is below 1, ``alpha`` is negative, ``channel_dim`` is 0 or
            ``memory`` unknown.
        ArgumentTypeError: if a size is not an integer or ``alpha`` is not a number.
        ShapeError: in ``forward``, if the channels are not ``in_channels``.

    Source: Gorgun, Gurbuz, Alatan, BMVC 2023; values and gradients follow the authors' code.

    Example:
        >>> import torch
        >>> from kdlayers import KDLayer
        >>> KDLayer(16, 32)(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 16, 7, 7])
        >>> KDLayer(16, 32, channel_dim=-1)(torch.randn(2, 49, 16)).shape
        torch.Size([2, 49, 16])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Features with the recognised knowledge added: same shape, same dtype."""
        return self.enhance(x)[0]


def check_memory(memory: str) -> str:
    """``memory``, if it is a known mode."""
    if memory not in MEMORY:
        raise ArgumentError(f'memory must be "normal" or "low", got {memory!r}')
    return memory


def _channels(x: Tensor, dim: int) -> int | str:
    return x.shape[dim] if -x.dim() <= dim < x.dim() else "..."
