"""Warns once where one term is far larger than another."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kdlayers._step.terms import Term
from kdlayers._utils.warn import warn

STEPS, RATIO = 50, 100.0


class Balance:
    """Keeps the weighted values of the first steps on their device, and reads them once.

    A step adds one small copy and does not wait for the device. Terms whose weight is a function
    are left out: a schedule is a choice, and a warm-up starts at 0.
    """

    def __init__(self, terms: Sequence[Term]) -> None:
        names = [term.name for term in terms if _fixed(term)]
        self.names = names if len(names) > 1 else []  # empty once there is nothing to compare
        self._seen: list[Tensor] = []

    def look(self, logged: Mapping[str, Tensor]) -> None:
        """Take the values of a step; after the last of the first steps, compare and warn."""
        # A copy, because under CUDA graphs the next step overwrites the values.
        self._seen.append(torch.stack([logged[f"{name}.weighted"] for name in self.names]))
        if len(self._seen) == STEPS:
            names, self.names = self.names, []
            values, self._seen = torch.stack(self._seen).abs().double().cpu(), []
            self._compare(names, values)

    def _compare(self, names: Sequence[str], values: Tensor) -> None:
        """Warn of the two terms that differ most in all steps, ``values[step, term]``."""
        ratios = (values[:, :, None] / values[:, None, :]).amin(dim=0)
        ratios = ratios.where(ratios.isfinite(), 0.0)  # no weight can raise a term that is 0
        if ratios.max() <= RATIO:
            return
        large, small = divmod(int(ratios.argmax()), len(names))
        means = values.mean(dim=0)
        warn(
            f"{names[large]} was more than {RATIO:.0f} times {names[small]} in each of the first "
            f"{STEPS} steps: weighted, their means are {means[large]:.3g} and {means[small]:.3g}. "
            f"Give {names[small]} a larger weight= or {names[large]} a smaller one; "
            "kd.gradient_norms(y) shows how strong each is"
        )


def _fixed(term: Term) -> bool:
    """Whether the weight is a number above 0."""
    weight = term.loss.weight
    return not callable(weight) and weight > 0
