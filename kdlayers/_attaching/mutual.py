"""Mutual learning: two students, each the other's teacher."""

import copy
from collections.abc import Iterable
from typing import Any

from torch import nn

from kdlayers._attaching.attach import attach_kd, check_losses
from kdlayers._step.handle import KDHandle
from kdlayers.errors import ArgumentError
from kdlayers.losses import DistillLoss, InheritExploreLoss, MutualLoss


def attach_mutual(
    a: nn.Module,
    b: nn.Module,
    *,
    losses: Iterable[DistillLoss] | None = None,
    example: Any = None,
) -> tuple[KDHandle, KDHandle]:
    """Make two students each other's teacher: deep mutual learning.

    Returns a handle for each student. In the sequential order of the authors' code, each batch
    updates ``a`` against ``b``, then ``b`` against the updated ``a``::

        for x, y in loader:
            for model, kd, opt in ((a, kd_a, opt_a), (b, kd_b, opt_b)):
                opt.zero_grad()
                (F.cross_entropy(model(x), y) + kd.loss(y)).backward()
                opt.step()

    For the simultaneous variant compute both losses before either step. The peer runs in its
    current mode, without gradients: in train mode its batch-norm statistics are updated twice per
    batch, as in the authors' code.

    Args:
        a: one student.
        b: the other student.
        losses: the losses against the peer; the second handle gets copies, with the points of
            ``at`` pairs exchanged. Default: :class:`MutualLoss`. Add
            ``InheritExploreLoss(at=..., coder="online")`` for the inherit-and-explore form.
        example: as in :func:`attach_kd`.

    Returns:
        The handles of ``a`` and of ``b``.

    Raises:
        ArgumentError: if a loss would be fitted to the peer before training.
        ArgumentTypeError: if ``losses`` are not :class:`DistillLoss` objects.
        KDLayersError: as :func:`attach_kd` does; neither student is changed then.

    Source: Zhang, Xiang, Hospedales, Lu, "Deep Mutual Learning", CVPR 2018; the order of updates
    checked against the released code of Huang et al., CVPR 2021.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import attach_mutual
        >>> a, b = resnet18(num_classes=4), resnet18(num_classes=4)
        >>> kd_a, kd_b = attach_mutual(a, b)
        >>> images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        >>> loss = torch.nn.functional.cross_entropy(a(images), labels) + kd_a.loss(labels)
        >>> loss.backward()
    """
    given = check_losses([MutualLoss()] if losses is None else losses)
    _refuse_fitted(given)
    exchanged = [_exchanged(loss) for loss in given]
    first = attach_kd(a, b, losses=given, example=example)
    try:
        second = attach_kd(b, a, losses=exchanged, example=example)
    except BaseException:
        first.remove()
        raise
    for handle in (first, second):
        for teacher in handle._teachers:  # pyright: ignore[reportPrivateUsage]  # our own
            teacher.eval_mode = False
    return first, second


def _refuse_fitted(losses: Iterable[DistillLoss]) -> None:
    for loss in losses:
        if isinstance(loss, InheritExploreLoss) and (loss.host, loss.coder) == ("factor", "fitted"):
            raise ArgumentError(
                "InheritExploreLoss learns the teacher's auto-encoder once, before training, but "
                'the peer of mutual learning changes all the time; pass coder="online", which '
                "trains the auto-encoder together with the students"
            )


def _exchanged(loss: DistillLoss) -> DistillLoss:
    copied = copy.deepcopy(loss)
    if isinstance(copied.at, tuple):
        ours, theirs = copied.at
        copied.at = (theirs, ours)
    return copied
