"""Folding: everything that is constant at inference becomes two matrices and a bias."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

from kdlayers._layer.batch_norm import as_affine
from kdlayers._layer.layer import LayerParts, product_dtype
from kdlayers._layer.recognise import recognise_frozen
from kdlayers._leaving.bake import replace_layers
from kdlayers._models.wrappers import student_inside
from kdlayers._step.sites import slots
from kdlayers._utils.chunks import DEVICES
from kdlayers._utils.norms import inverse_norm
from kdlayers._utils.torch_internals import in_transform, plain
from kdlayers.errors import AttachError

# A single node in graphs of torch.fx, which tools for quantisation leave in float.
torch.fx.wrap("folded")


class FoldedKDLayer(nn.Module):
    r"""A KD layer for inference, with its kernels normalised and its scales and batch norm folded.

    .. math:: p = \operatorname{ReLU}\Big(A \frac{x}{\lVert x\rVert} + b\Big), \qquad
        \hat x = x + M \frac{p}{\lVert p\rVert}

    A, b and M are buffers: there is nothing to train.
    """

    matching: Tensor
    threshold: Tensor
    values: Tensor

    def __init__(self, slot: LayerParts) -> None:
        super().__init__()
        head, norm, value = slot.head, slot.norm, slot.value
        gain, bias = as_affine(norm)
        unit = _unit_rows(head.weight) * head.scale.double()
        mixed = slot.alpha * value.scale.double() * _unit_rows(value.weight)
        dtype = head.weight.dtype
        self.channel_dim = head.channel_dim
        self.register_buffer("matching", (gain[:, None] * unit).to(dtype))
        self.register_buffer("threshold", bias.to(dtype))
        self.register_buffer("values", mixed.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Features with the recognised knowledge added: same shape, same dtype."""
        simple = is_scripting() or not isinstance(x, Tensor)  # torch.fx traces with symbols
        if not simple and self.chunked(x.device):
            return x + self._in_chunks(x)
        return folded(x, self.matching, self.threshold, self.values, self.channel_dim)

    @torch.jit.unused
    def chunked(self, device: torch.device) -> bool:
        """Whether to compute in chunks that stay in the cache; see `LayerParts.frozen`."""
        quiet = not (torch.is_grad_enabled() or is_tracing() or torch.compiler.is_compiling())
        return quiet and device.type in DEVICES and not in_transform()

    @torch.jit.unused
    def _in_chunks(self, x: Tensor) -> Tensor:
        """What is added to ``x``."""
        features, dtype = plain(x).movedim(self.channel_dim, -1), product_dtype(x)
        units = (features * inverse_norm(features)).to(dtype).flatten(0, -2)
        matching, values = self.matching.to(dtype), self.values.to(dtype)
        value = recognise_frozen(units, matching, self.threshold, values).view_as(features)
        return value.movedim(-1, self.channel_dim).to(x.dtype)


def folded(
    x: Tensor, matching: Tensor, threshold: Tensor, values: Tensor, channel_dim: int
) -> Tensor:
    """The layer's features by plain operations."""
    features = x.movedim(channel_dim, -1)
    # Norms are applied after the products, to K or C numbers per position, rather than before.
    scores = F.linear(features, matching) * inverse_norm(features)
    assignment = F.relu(scores + threshold)
    value = F.linear(assignment.to(x.dtype), values) * inverse_norm(assignment)
    return x + value.movedim(-1, channel_dim).to(x.dtype)


def _unit_rows(weight: Tensor) -> Tensor:
    return F.normalize(weight.detach().double(), dim=1, eps=1e-12)


def fold(student: nn.Module) -> nn.Module:
    r"""A copy of the student for inference, whose KD layers are folded to two matrices and a bias.

    .. math:: \hat x = x + M \frac{p}{\lVert p\rVert}, \qquad
        p = \operatorname{ReLU}\Big(A \frac{x}{\lVert x\rVert} + b\Big)

    A, b and M hold the normalised kernels, the scales and the batch norm. As with :func:`bake`, no
    hook is left. Outputs are equal up to rounding (about 1e-6 in float32).
    The copy is in eval mode and its layers cannot be trained; the student is not changed.

    Args:
        student: a model with KD layers, attached or detached. Wrappers such as ``torch.compile``,
            DDP or a moving average are not copied.

    Returns:
        The copy, in eval mode.

    Raises:
        AttachError: if the model has no KD layers, FSDP has split its parameters, or a layer is
            pruned, reparametrised by hooks or wrapped.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDPoint, attach_kd, fold
        >>> student = resnet18().eval()
        >>> kd = attach_kd(student, at=[KDPoint("layer4", num_templates=16)])
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.allclose(fold(student)(images), student(images), atol=1e-5)
        True
    """
    for name, slot in slots(student_inside(student)).items():
        wrapped = slot.wrapped()
        if wrapped is not None:
            raise AttachError(
                f"the KD layer at {name!r} cannot be folded with {wrapped}, because its output "
                "does not depend on its parameters alone; make the change permanent first, for "
                "instance with torch.nn.utils.prune.remove or by merging the adapter, or use "
                "bake(student)"
            )
    with torch.no_grad():
        copied = replace_layers(student, FoldedKDLayer, "fold")
    return copied.eval()
