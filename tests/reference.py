"""A reference implementation of the method, position by position.

Follows the published equations and nothing of the library: loops instead of convolutions,
distances by subtraction, softmax by its definition.
"""

import torch
from torch import Tensor


def unit(vector: Tensor) -> Tensor:
    """The vector scaled to length 1; a zero vector maps to zero."""
    return vector / vector.norm() if bool((vector != 0).any()) else vector * 0


def cosine(vectors: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """Rows of ``vectors`` [N, I] against rows of ``matrix`` [O, I]: [N, O]."""
    out = []
    for u in vectors:
        out.append(torch.stack([scale.squeeze() * (unit(m) * unit(u)).sum() for m in matrix]))
    return torch.stack(out)


def batch_norm(scores: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Training-mode batch norm over positions [N, K]."""
    mean = scores.mean(0)
    variance = ((scores - mean) ** 2).mean(0)
    return (scores - mean) / (variance + eps).sqrt() * weight + bias


def kd_layer(x: Tensor, p: dict[str, Tensor], alpha: float) -> tuple[Tensor, Tensor]:
    """The layer on [B, C, H, W] in training mode: new features and scores [B, K, H, W]."""
    b, c, h, w = x.shape
    rows = x.permute(0, 2, 3, 1).reshape(-1, c)
    scores = cosine(rows, p["head.weight"], p["head.scale"])
    assigned = torch.relu(batch_norm(scores, p["norm.weight"], p["norm.bias"]))
    features = rows + alpha * cosine(assigned, p["value.weight"], p["value.scale"])

    def back(t: Tensor) -> Tensor:
        return t.reshape(b, h, w, -1).permute(0, 3, 1, 2)

    return back(features), back(scores)


def template_kl(scores: Tensor, targets: Tensor) -> Tensor:
    """KL(targets || softmax(scores)) over [N, K], mean over rows."""
    total = scores.new_zeros(())
    for a, q in zip(scores, targets, strict=True):
        probability = a.exp() / a.exp().sum()
        for k in range(len(a)):
            if q[k] > 0:
                total = total + q[k] * (q[k].log() - probability[k].log())
    return total / len(scores)


def codebook_assignment(features: Tensor, centers: Tensor, sharpness: float = 1.0) -> Tensor:
    """Softmax over minus the squared distances, [N, D] and [K, D] to [N, K]."""
    out = []
    for f in features:
        d = torch.stack([((f - e) ** 2).sum() for e in centers])
        e = torch.exp(-sharpness * (d - d.min()))
        out.append(e / e.sum())
    return torch.stack(out)


def decision_assignment(
    features: Tensor,
    labels: Tensor,
    projection: Tensor,
    shift: Tensor,
    centers: Tensor,
    table: Tensor,
) -> Tensor:
    """The row of the count table at the nearest sub-class of the label's own class."""
    classes = int(labels.max()) + 1
    subclasses = len(centers) // max(classes, 1)
    rows = []
    for f, y in zip(features, labels, strict=True):
        z = projection @ f + shift
        best, at = float("inf"), -1
        for s in range(int(y) * subclasses, (int(y) + 1) * subclasses):
            d = float(((z - centers[s]) ** 2).sum())
            if d < best:
                best, at = d, s
        rows.append(table[at])
    return torch.stack(rows)


def check_divergence(targets, features: Tensor, labels: Tensor, units, templates, *, scores: bool):
    """The divergence of targets against the formula, with gradients; given scores or vectors."""
    ours = targets.divergence(
        units @ templates.T if scores else units,
        features,
        labels,
        templates=None if scores else templates,
    )
    plain = template_kl(units @ templates.T, targets.soft_assignment(features, labels))
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=0)
    for mine, theirs in zip(
        torch.autograd.grad(ours, (units, templates)),
        torch.autograd.grad(plain, (units, templates)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-13)
