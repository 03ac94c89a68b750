r"""Schedules of a loss weight: functions of the step, for ``weight=`` of any loss.

A schedule is a small frozen object that maps the step (0, 1, 2, ..., the number of earlier calls of
``kd.loss``) to a weight. Schedules can be pickled, compared and multiplied:
``Cosine(100) * 0.9``, ``LinearWarmup(10) * Step(30)``.

Lengths count steps. With ``steps_per_epoch=len(loader)`` they count epochs, and the value changes
at the first step of each epoch.

The rules are those in the authors' code of Z. Huang et al., "Revisiting Knowledge Distillation: An
Inheritance and Exploration Framework", CVPR 2021.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, pi, prod

from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.functional import _checks as check

__all__ = ["Constant", "Cosine", "LinearWarmup", "MultiStep", "Product", "Schedule", "Step"]


class Schedule(ABC):
    """A weight as a function of the step.

    ``weight=`` also takes a plain function. Subclass this if the weight should support
    multiplication and pickling with its loss.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Halving(Schedule):
        ...     def __call__(self, step: int) -> float:
        ...         return 0.5**step
        >>> (Halving() * 8.0)(2)
        2.0
    """

    @abstractmethod
    def __call__(self, step: int) -> float:
        """The weight at ``step``, which counts from 0."""

    def __mul__(self, other: "Schedule | float") -> "Product":
        return Product(self, other)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Constant(Schedule):
    """The same weight at every step.

    Args:
        value: the weight, 0 or more. Default 1.

    Raises:
        ArgumentError: if ``value`` is negative or not finite.
        ArgumentTypeError: if ``value`` is not a number.

    Example:
        >>> Constant(0.5)(1000)
        0.5
    """

    value: float = 1.0

    def __post_init__(self) -> None:
        check.not_negative("value", self.value)

    def __call__(self, step: int) -> float:  # noqa: ARG002
        """The value."""
        return self.value


@dataclass(frozen=True)
class LinearWarmup(Schedule):
    r"""A straight line from ``start`` to another schedule, which follows it.

    .. math::
        w(t) = \begin{cases}
            s + t \, \frac{v(L) - s}{L} & t < L \\ v(t) & \text{else} \end{cases}

    The ramp of decoupled distillation, :math:`\min((e + 1) / L, 1)` over whole epochs :math:`e`,
    is ``LinearWarmup(L - 1, start=1 / L, steps_per_epoch=len(loader))``. The authors' code above
    starts from 0.01.

    Args:
        length: L, the length of the ramp, 0 or more; 0 is no ramp.
        then: v, the schedule after the ramp, or a number. Default 1.
        start: s, the weight at step 0. Default 0.
        steps_per_epoch: if given, ``length`` counts epochs; ``then`` always gets the step.

    Raises:
        ArgumentError: if a number is negative or not finite, or ``steps_per_epoch`` is below 1.
        ArgumentTypeError: if an argument has another type.

    Example:
        >>> [LinearWarmup(4)(step) for step in range(6)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """

    length: float
    then: Schedule | float = 1.0
    start: float = 0.0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check.not_negative("length", self.length)
        check.not_negative("start", self.start)
        _epoch_length(self.steps_per_epoch)
        object.__setattr__(self, "then", _schedule("then", self.then))

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        then = _schedule("then", self.then)
        time = _time(step, self.steps_per_epoch)
        if time >= self.length:
            return then(step)
        goal = then(round(self.length * (self.steps_per_epoch or 1)))
        return self.start + time * (goal - self.start) / self.length


@dataclass(frozen=True)
class Cosine(Schedule):
    r"""Half a cosine from ``value`` to ``end``; after that the weight stays the same.

    .. math:: w(t) = e + (v - e) \, \tfrac12 \big(1 + \cos(\pi \min(t, L) / L)\big)

    In the authors' code the weight rises again after step L.

    Args:
        length: L, above 0: usually the length of the training.
        value: v, the weight at step 0. Default 1.
        end: e, the weight from step L on. Default 0.
        steps_per_epoch: if given, ``length`` counts epochs.

    Raises:
        ArgumentError: if ``length`` is not above 0, another number is negative or not finite, or
            ``steps_per_epoch`` is below 1.
        ArgumentTypeError: if an argument has another type.

    Example:
        >>> [round(Cosine(4)(step), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """

    length: float
    value: float = 1.0
    end: float = 0.0
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check.positive("length", self.length)
        check.not_negative("value", self.value)
        check.not_negative("end", self.end)
        _epoch_length(self.steps_per_epoch)

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        done = min(_time(step, self.steps_per_epoch) / self.length, 1.0)
        return self.end + (self.value - self.end) * (1 + cos(pi * done)) / 2


@dataclass(frozen=True)
class Step(Schedule):
    r"""A weight that is multiplied by ``gamma`` at regular intervals.

    .. math:: w(t) = v \, \gamma^{\lfloor t / \text{every} \rfloor}

    Args:
        every: length of an interval, above 0.
        value: v, the weight at step 0. Default 1.
        gamma: factor, 0 or more. Default 0.1.
        steps_per_epoch: if given, ``every`` counts epochs.

    Raises:
        ArgumentError: if ``every`` is not above 0, another number is negative or not finite, or
            ``steps_per_epoch`` is below 1.
        ArgumentTypeError: if an argument has another type.

    Example:
        >>> [Step(2, gamma=0.5)(step) for step in range(6)]
        [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    every: float
    value: float = 1.0
    gamma: float = 0.1
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        check.positive("every", self.every)
        check.not_negative("value", self.value)
        check.not_negative("gamma", self.gamma)
        _epoch_length(self.steps_per_epoch)

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        return float(self.value * self.gamma ** (_time(step, self.steps_per_epoch) // self.every))


@dataclass(frozen=True)
class MultiStep(Schedule):
    r"""A weight that is multiplied by ``gamma`` at each of the given milestones.

    .. math:: w(t) = v \, \gamma^{n}, \qquad n = \#\{m \in \text{milestones} : m \le t\}

    Args:
        milestones: a sequence of steps in rising order, each 0 or more.
        value: v, the weight before the first milestone. Default 1.
        gamma: factor, 0 or more. Default 0.1.
        steps_per_epoch: if given, the milestones count epochs.

    Raises:
        ArgumentError: if the milestones do not rise, a number is negative or not finite, or
            ``steps_per_epoch`` is below 1.
        ArgumentTypeError: if ``milestones`` is not a sequence, or another argument has another
            type.

    Example:
        >>> [MultiStep((1, 3), gamma=0.5)(step) for step in range(5)]
        [1.0, 0.5, 0.5, 0.25, 0.25]
    """

    milestones: tuple[float, ...]
    value: float = 1.0
    gamma: float = 0.1
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Iterable):
            raise ArgumentTypeError(
                "MultiStep takes a sequence of milestones, such as MultiStep((30, 60)), got "
                f"{self.milestones!r}; for one milestone write MultiStep(({self.milestones!r},))"
            )
        object.__setattr__(self, "milestones", tuple(self.milestones))
        for milestone in self.milestones:
            check.not_negative("a milestone", milestone)
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ArgumentError(f"milestones must be strictly increasing, got {self.milestones}")
        check.not_negative("value", self.value)
        check.not_negative("gamma", self.gamma)
        _epoch_length(self.steps_per_epoch)

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        time = _time(step, self.steps_per_epoch)
        return float(self.value * self.gamma ** sum(m <= time for m in self.milestones))


@dataclass(frozen=True, init=False)
class Product(Schedule):
    """The product of schedules; ``a * b`` makes one.

    Args:
        factors: schedules, or numbers of 0 or more.

    Raises:
        ArgumentError: if a number is negative or not finite.
        ArgumentTypeError: if a factor is neither a schedule nor a number, such as a plain function.

    Example:
        >>> Product(Constant(0.5), 4.0)(7)
        2.0
    """

    factors: tuple[Schedule, ...]

    def __init__(self, *factors: Schedule | float) -> None:
        object.__setattr__(self, "factors", tuple(_schedule("a factor", each) for each in factors))

    def __call__(self, step: int) -> float:
        """The weight at ``step``."""
        return float(prod(factor(step) for factor in self.factors))


def _time(step: int, steps_per_epoch: int | None) -> int:
    return step // steps_per_epoch if steps_per_epoch else step


def _schedule(name: str, value: "Schedule | float") -> Schedule:
    return value if isinstance(value, Schedule) else Constant(check.not_negative(name, value))


def _epoch_length(steps_per_epoch: int | None) -> None:
    if steps_per_epoch is not None:
        check.count("steps_per_epoch", steps_per_epoch)
