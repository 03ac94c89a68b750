"""What `attach_kd` added to a student: KD layers, train-only parameters, and their state."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from kdlayers._layer.layer import KDLayer
from kdlayers._step.sites import inserts, slots
from kdlayers._step.state import load_state, state_of
from kdlayers._step.summary import summarise
from kdlayers._step.tape import Tape
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Term, follow


class Attachment:
    """Base class of `KDHandle`: everything except the training step."""

    student: nn.Module
    step: int
    _teachers: list[Teacher]
    _terms: list[Term]
    _tape: Tape
    _fitted: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """Train-only parameters of the losses, for the optimiser; excludes the student's own."""
        seen: set[nn.Parameter] = set()
        for term in self._terms:
            for parameter in term.loss.parameters():
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    yield parameter

    def added_parameters(self, *, decay: bool | None = None) -> list[nn.Parameter]:
        """All parameters that attach_kd added: those of the KD layers and the train-only ones.

        Use it if the optimiser already exists, or if these parameters need their own rate::

            optimizer.add_param_group({"params": kd.added_parameters()})

        To exclude scales, norms and biases from weight decay::

            matrices, others = (kd.added_parameters(decay=decay) for decay in (True, False))
            optimizer.add_param_group({"params": matrices})
            optimizer.add_param_group({"params": others, "weight_decay": 0.0})

        Add the groups before you create a learning-rate scheduler. If the optimiser is created
        after attach_kd from ``student.parameters()``, it already holds the parameters of the KD
        layers and only needs :meth:`parameters`.

        Args:
            decay: ``True``: only matrices, which usually get weight decay; ``False``: only scales,
                norms and biases; ``None`` (default): all.

        Returns:
            The parameters that require a gradient; those of the KD layers come first.
        """
        inside = [p for layer in self.layers.values() for p in layer.parameters()]
        whole = dict.fromkeys([p for p in inside if p.requires_grad])
        whole.update(dict.fromkeys(self.parameters()))
        return [p for p in whole if decay is None or decay == (p.dim() > 1)]

    @property
    def layers(self) -> dict[str, KDLayer]:
        """The KD layers of this handle, keyed by the names of their points, in forward order.

        They share parameters, batch norms, ``alpha`` and ``memory`` with the student: setting
        ``kd.layers[name].alpha`` changes the student. Inside the student, hooks apply the layers,
        and the submodule ``<point>...kd`` holds their parameters. :meth:`detach` keeps the layers;
        :meth:`remove` deletes them.
        """
        found = inserts(self.student)
        own = [(hook, module) for module, _, hook in found if hook.tape is self._tape]
        # attach_kd placed them in forward order; the modules may be registered in another one.
        own.sort(key=lambda pair: pair[0].key)
        return {hook.name: hook.slot(module).as_layer() for hook, module in own}

    def state_dict(self) -> dict[str, Any]:
        """Targets, train-only parameters, the step, and a hash of each teacher's weights.

        Save it with the state of the student and of the optimiser to resume training exactly. The
        tensors are copies. The state includes a checksum of them.
        """
        return state_of(self._terms, self._teachers, self.step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a state that :meth:`state_dict` returned. The losses need not be fitted again.

        If loading fails, all losses keep their previous state.

        Raises:
            CheckpointError: if the state belongs to other losses or points, or to KD layers or a
                teacher of other sizes, or if it is damaged, modified, or of an unknown version.

        Warns:
            KDLayersWarning: if a teacher's weights are not those that the state was saved with. A
                sharded teacher, and a student of :func:`kdlayers.attach_mutual`, are not compared.
        """
        places = {(p.device, p.dtype == torch.float64) for p in self.student.parameters()}
        if len(places) == 1:  # as the first step would, so that the optimiser's state fits too
            for term in self._terms:
                follow(term.loss, *next(iter(places)), was_double=False)
        self.step = load_state(self._terms, self._teachers, slots(self.student), state)
        self._look_again()

    def summary(self) -> str:
        """Table of the points, added parameters and multiply-adds, and of what is fitted."""
        return summarise(self.student, self._terms)

    def __repr__(self) -> str:
        return self.summary()

    def _look_again(self) -> None:
        """Check again whether the losses are fitted, and on which device their tensors are."""
        self._fitted = False
        for term in self._terms:
            term.place = None
