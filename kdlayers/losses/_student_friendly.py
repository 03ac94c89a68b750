"""Student-friendly knowledge distillation: the teacher's logits are simplified for the student."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kdlayers._utils.warn import warn
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional import kd
from kdlayers.functional._checks import work_dtype
from kdlayers.losses._base import DistillLoss, LogitLoss, Weight
from kdlayers.losses._kd import KDLoss
from kdlayers.losses._simplifier import AttentionSimplifier


class StudentFriendlyKDLoss(LogitLoss):
    r"""Student-friendly knowledge distillation (Yuan, Lang, Quan, 2023): a simplified teacher.

    .. math::
        x = z^T / T, \qquad u = \mathrm{simplifier}(x), \qquad \tilde z = T u, \qquad
        L = L_\mathrm{base}(z^S, \tilde z, y)

    A learnt simplifier between the teacher and the loss turns the teacher's logits into logits that
    the student can follow. The base loss is unchanged. Its gradient trains the simplifier through
    the teacher's side, together with the student; the teacher itself gets no gradient. With the
    default simplifier step 0 equals the base loss. A teacher logit of -inf is a class of
    probability 0: the simplifier sees 0 in its place, and the simplified logit is -inf again.
    :meth:`parameters` has the simplifier for the optimiser. If you leave it out, the loss equals
    the base loss, without an error. The exported student does not have the simplifier.

    **A reconstruction from the public summary.** It states softening by a temperature, then a
    learnt attention, and joint training by an unchanged distillation loss. The attention's layout,
    residual and initialisation, the temperature and the weights are our choices. We claim no
    published accuracy. ("SKD" names several other methods too.)

    **Collapse.** The loss is 0 when the simplifier copies the student, so give the cross-entropy
    the same weight, not 0.1 to 0.9. :meth:`metrics` shows a collapse: ``entropy`` of softmax(u),
    ``agreement`` of its largest class with the teacher's, ``teacher_kl`` =
    KL(softmax(x) || softmax(u)), each a mean over the batch. The loss warns when the mean agreement
    over ``check_every`` calls is below ``min_agreement``.

    Args:
        base: the loss that compares logits. Default: KDLoss. Also DKDLoss, AEKTLoss (our
            combination) or your own, if it does not detach the teacher. Its own ``weight``, ``at``,
            ``name`` and ``teacher_index`` must be the defaults.
        simplifier: any module ``[B, K] -> [B, K]`` from x to u. Default
            :class:`~kdlayers.losses.AttentionSimplifier`, made for the number of classes by
            :func:`kdlayers.attach_kd` or at the first call.
        temperature: T, above 0. Default: the base loss's, or 4. The base must have the same.
        simplifier_grad_scale: factor of the gradient from the base loss into the simplifier, 0 or
            more; 1/T^2 cancels the base's T^2 there. Default 1.
        anchor: factor, 0 or more, of KL(softmax(x) || softmax(u)), which keeps the simplifier near
            the teacher. Default 0: the method trains the simplifier by the distillation loss alone.
        min_agreement: between 0 and 1; default 0.5 (healthy toy runs stay above 0.98, collapsed
            ones fall below 0.1). 0 never warns.
        check_every: calls between two checks of the agreement, each of which waits for the device.
            Default 100. ``torch.compile`` leaves the checks out; watch ``kd.terms``.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`.

    Raises:
        ArgumentError: if a number is out of range or ``base`` cannot be used.
        ArgumentTypeError: if ``base`` is not a DistillLoss, ``simplifier`` is not a module, or
            another setting is not a number.
        ShapeError: at the call, if shapes differ.

    Warns:
        KDLayersWarning: when the simplified logits no longer agree with the teacher.

    Example:
        >>> import torch
        >>> loss = StudentFriendlyKDLoss()
        >>> loss(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])).detach()
        tensor(2.6012)
        >>> loss.student_friendly(torch.tensor([[6.0, 1.0, -2.0]])).detach()
        tensor([[ 6.,  1., -2.]])
    """

    detaches_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        base: DistillLoss | None = None,
        simplifier: nn.Module | None = None,
        temperature: float | None = None,
        simplifier_grad_scale: float = 1.0,
        anchor: float = 0.0,
        min_agreement: float = 0.5,
        check_every: int = 100,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        simplifier_grad_scale = check.not_negative("simplifier_grad_scale", simplifier_grad_scale)
        anchor = check.not_negative("anchor", anchor)
        min_agreement = check.not_negative("min_agreement", min_agreement)
        if min_agreement > 1:
            raise ArgumentError(f"min_agreement is a share, between 0 and 1, got {min_agreement}")
        check_every = check.count("check_every", check_every)
        if simplifier is not None and not isinstance(simplifier, nn.Module):
            raise ArgumentTypeError(
                f"simplifier must be an nn.Module, got {type(simplifier).__name__}"
            )
        self.base = (
            KDLoss(temperature=4.0 if temperature is None else temperature)
            if base is None
            else base
        )
        self.temperature = _temperature(self.base, temperature)
        self.simplifier = simplifier
        self.simplifier_grad_scale = simplifier_grad_scale
        self.anchor = anchor
        self.min_agreement = min_agreement
        self.check_every = check_every
        self.metric_names = ("entropy", "agreement", "teacher_kl", *self.base.metric_names)
        self._calls = 0
        self._agreement: Tensor | float = 0.0

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the default simplifier for the number of classes, and what the base loss needs."""
        super().build(student, teacher)
        self.base.build(student, teacher)
        self._build_simplifier(teacher)

    def _build_simplifier(self, teacher: Tensor) -> None:
        if self.simplifier is None:
            made = AttentionSimplifier(teacher.shape[1])
            self.simplifier = made.to(teacher.device, work_dtype(teacher))

    def _build_from(self, state: dict[str, Tensor]) -> None:
        saved = state.get("simplifier.query.weight")
        if self.simplifier is None and saved is not None:
            width, classes = saved.shape
            self.simplifier = AttentionSimplifier(classes, width).to(saved.device, saved.dtype)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """The base loss against the simplified logits, for logits ``[B, K]``."""
        self.build(student, teacher)
        softened = self._softened(teacher)
        simplified = self._simplified(softened)
        scale = self.simplifier_grad_scale
        passed = simplified
        if scale != 1:  # same value, scaled gradient
            change = (simplified - simplified.detach()).masked_fill(_masked(softened), 0.0)
            passed = simplified.detach() + scale * change
        loss: Tensor = self.base(student, self.temperature * passed, targets)
        teacher_kl = kd(simplified, softened, temperature=1.0)
        self._watch(softened, simplified, teacher_kl)
        return loss if self.anchor == 0 else loss + self.anchor * teacher_kl

    def student_friendly(self, teacher: Tensor) -> Tensor:
        """``[B, K]``: the simplified logits at the teacher's own scale, to use in its place.

        Args:
            teacher: the teacher's logits, ``[B, K]``; no gradient reaches them.

        Raises:
            ShapeError: if they are not logits, or the simplifier changes their shape.
        """
        check.logits(teacher, teacher)
        self._build_simplifier(teacher)
        return self.temperature * self._simplified(self._softened(teacher))

    def _softened(self, teacher: Tensor) -> Tensor:
        return teacher.detach().to(work_dtype(teacher)) / self.temperature

    def _simplified(self, softened: Tensor) -> Tensor:
        if self.simplifier is None:
            raise ArgumentError("StudentFriendlyKDLoss needs its simplifier; do not set it to None")
        masked = _masked(softened)
        simplified: Tensor = self.simplifier(softened.masked_fill(masked, 0.0))
        if simplified.shape != softened.shape:
            raise ShapeError(
                f"the simplifier must keep the shape [batch, classes]: it got "
                f"{check.shape(softened)} and gave {check.shape(simplified)}"
            )
        return simplified.masked_fill(masked, -torch.inf)

    def _watch(self, softened: Tensor, simplified: Tensor, teacher_kl: Tensor) -> None:
        with torch.no_grad():
            logs = simplified.log_softmax(dim=1)
            plogs = (logs.exp() * logs).masked_fill(logs.isneginf(), 0.0)
            agrees = simplified.argmax(dim=1) == softened.argmax(dim=1)
            agreement = agrees.to(logs.dtype).mean()
            entropy = -plogs.sum(dim=1).mean()
        self._record(entropy=entropy, agreement=agreement, teacher_kl=teacher_kl)
        self._metrics.update(self.base.metrics())
        if not torch.compiler.is_compiling():
            self._warn_on_collapse(agreement)

    def _warn_on_collapse(self, agreement: Tensor) -> None:
        self._calls += 1
        self._agreement = self._agreement + agreement
        if self._calls < self.check_every:
            return
        mean = float(self._agreement) / self._calls  # the only wait for the device
        self._calls, self._agreement = 0, 0.0
        if mean < self.min_agreement:
            warn(
                f"the simplified logits agree with the teacher's class on {mean:.0%} of the last "
                "samples: the simplifier seems to copy the student. Give cross-entropy more "
                "weight (that of this loss), lower simplifier_grad_scale, or set anchor"
            )

    def extra_repr(self) -> str:
        """Shows numbers, weight and at."""
        return f"temperature={self.temperature}, anchor={self.anchor}, {super().extra_repr()}"


def _masked(softened: Tensor) -> Tensor:
    """Mask of the logits of -inf, where the teacher lacks the class. The simplifier sees 0."""
    return softened.isneginf()


def _temperature(base: object, temperature: float | None) -> float:
    """The one temperature of simplifier and base; raise if ``base`` cannot be used."""
    if not isinstance(base, DistillLoss):
        raise ArgumentTypeError(f"base must be a DistillLoss, got {type(base).__name__}")
    kind = type(base).__name__
    if base.detaches_teacher:
        raise ArgumentError(
            f"base={kind} sends no gradient to the teacher's side, so the simplifier would never "
            "learn; use KDLoss, DKDLoss or AEKTLoss"
        )
    given = (base.at, base.name, base.teacher_index)
    if callable(base.weight) or base.weight != 1 or given != (None, None, None):
        raise ArgumentError(
            f"weight, at, name and teacher_index of base={kind} would be ignored; give them to "
            "StudentFriendlyKDLoss"
        )
    own = getattr(base, "temperature", None)
    if own is not None and temperature is not None and own != temperature:
        raise ArgumentError(
            f"base={kind} has temperature={own}, but StudentFriendlyKDLoss was given "
            f"{temperature}; set the temperature of the base only"
        )
    chosen = own if own is not None else temperature if temperature is not None else 4.0
    return float(check.positive("temperature", chosen))
