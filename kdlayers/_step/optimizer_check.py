"""Detects an optimiser that does not hold the parameters that attach_kd added."""

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from kdlayers._step.sites import slots
from kdlayers._step.slot import SLOT
from kdlayers._step.terms import Term
from kdlayers._utils.warn import warn
from kdlayers.functional._checks import NARROW

_PARTS = ("head", "norm", "value")
"""The parts of a KD layer that have parameters."""


class OptimiserWatch:
    """Compares some values of the student's own and of the added parameters between steps.

    If an optimiser step changes the student's own parameters, it must also change each group of
    added parameters whose loss has a nonzero weight. Each group is checked once, so that later
    steps cost nothing.
    """

    def __init__(
        self,
        student: nn.Module | None,
        own: Iterable[nn.Parameter],
        added: Mapping[str, Iterable[nn.Parameter]],
    ) -> None:
        self.student = student
        named = () if student is None else student.named_parameters()
        self.names = {id(parameter): name for name, parameter in named}
        everything = [p for p in own if p.requires_grad]
        self.all_own = everything
        # Not only one, because the forward may not use it, as that of a model without its head.
        places = {0, len(everything) // 2, len(everything) - 1} if everything else set()
        self.own = [everything[place] for place in sorted(places)]
        groups = {name: [p for p in group if p.requires_grad] for name, group in added.items()}
        self.unjudged = {name: group for name, group in groups.items() if group and self.own}
        self.own_before: Tensor | None = None
        self.dtypes: list[torch.dtype] = []
        self.before: dict[str, Tensor] = {}

    def look(self, live: Collection[str]) -> None:
        """Check the last optimiser step, and warn about groups that it did not change.

        Every call of ``loss`` calls this with the groups that get a gradient in this step.
        """
        if self.all_own:
            self._tell_frozen()
            self._tell_partly_frozen()
        if not self.unjudged:
            return
        own = self._probe(self.own, every=False)
        dtypes = [p.dtype for p in self.own]
        stepped = self.own_before is not None and not _equal(own, self.own_before)
        if stepped and dtypes == self.dtypes:  # student.half() changes values too
            self._judge()
        self.dtypes = dtypes
        self.own_before = own
        self.before = {name: self._probe(g) for name, g in self.unjudged.items() if name in live}

    def _judge(self) -> None:
        groups = {name: self.unjudged.pop(name) for name in self.before}
        # Parameters that were frozen after attach_kd must not change.
        groups = {name: g for name, g in groups.items() if any(p.requires_grad for p in g)}
        probes = {name: self._probe(g) for name, g in groups.items()}
        # A rank may hold no part of a small parameter that FSDP has sharded.
        still = [n for n, p in probes.items() if p.numel() and _equal(p, self.before[n])]
        if still:
            rounded = {str(p.dtype) for name in still for p in groups[name] if p.dtype in NARROW}
            small = f"; or its steps are below the precision of {', '.join(sorted(rounded))}"
            warn(
                f"the optimiser changed the student but not {', '.join(still)}: it was made before "
                "attach_kd, or without kd.parameters(). Make it after attach_kd as "
                "Optimizer([*student.parameters(), *kd.parameters()]), or add the parameters to "
                'it: optimizer.add_param_group({"params": kd.added_parameters()})'
                f"{small if rounded else ''}",
            )

    def _tell_frozen(self) -> None:
        """Warn once, at the first step, if a tool has frozen the student with its KD layers."""
        own, self.all_own = self.all_own, []
        added = {name: g for name, g in self.unjudged.items() if g}
        frozen = [name for name, g in added.items() if not any(p.requires_grad for p in g)]
        if frozen and not any(p.requires_grad for p in own) and not self._layers_learn():
            warn(
                f"all parameters that the student had at attach_kd are frozen, and so are those of "
                f"{', '.join(frozen)}, for example by peft's get_peft_model: the KD layers do not "
                "learn. Before you create the optimiser, set requires_grad_(True) on their "
                "parameters (the names with '.kd.'), or pass modules_to_save=[\"kd\"] to peft",
            )

    def _tell_partly_frozen(self) -> None:
        """Warn at the first step of KD layers of which only some parts are trainable."""
        layers = {} if self.student is None else slots(self.student)
        for name, slot in layers.items():
            parts = {part: list(getattr(slot, part).parameters()) for part in _PARTS}
            learns = {part: any(p.requires_grad for p in group) for part, group in parts.items()}
            frozen = [part for part, group in parts.items() if group and not learns[part]]
            if frozen and any(learns.values()):
                warn(
                    f"the KD layer at {name!r} is frozen in part: {', '.join(frozen)} cannot be "
                    "trained, the rest can. peft does this if a name in modules_to_save, such as "
                    '"head", is also the end of a name in a KD layer, such as "kd.head": pass '
                    'modules_to_save=["kd"] instead. Otherwise call requires_grad_(True) on these '
                    "parameters before you create the optimiser"
                )

    def _probe(self, parameters: Iterable[nn.Parameter], *, every: bool = True) -> Tensor:
        """The first values; with ``every``, all of those in half precision.

        There a small step rounds most values back. One changed value shows that the optimiser has
        the parameter.
        """
        flat = [_local(self._now(p)).flatten() for p in parameters]
        parts = [(v if every and v.dtype in NARROW else v[:64]).float() for v in flat]
        return torch.cat([part.to(parts[0].device) for part in parts])  # a model may span devices

    def _now(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter of the same name: FSDP replaces all that a student had at attach_kd."""
        name = self.names.get(id(parameter))
        if name is None or self.student is None:
            return parameter
        try:
            return self.student.get_parameter(name)
        except AttributeError:
            return parameter  # it has another name now

    def _layers_learn(self) -> bool:
        """Whether the student has trainable KD layers, such as the copies that peft makes."""
        named = () if self.student is None else self.student.named_parameters()
        return any(p.requires_grad for name, p in named if SLOT in name.split("."))


def _equal(now: Tensor, before: Tensor) -> bool:
    return torch.equal(now, before.to(now.device))  # the model may have moved since


def _local(parameter: nn.Parameter) -> Tensor:
    to_local = getattr(parameter, "to_local", None)  # FSDP's shards
    return parameter.detach() if to_local is None else to_local().detach()


def parameter_groups(
    student: nn.Module, terms: Iterable[Term]
) -> tuple[list[nn.Parameter], dict[str, list[nn.Parameter]]]:
    """The student's own parameters, and those that attach_kd added for each term."""
    layers = slots(student)
    new = {id(p) for slot in layers.values() for p in slot.parameters()}
    own = [p for p in student.parameters() if id(p) not in new]
    added: dict[str, list[nn.Parameter]] = {}
    for term in terms:
        added[term.name] = list(term.loss.parameters())
        if term.scores and term.point in layers:
            # The loss has a gradient for the templates, for any alpha.
            added[term.name].append(layers[term.point].head.weight)
    return own, added
