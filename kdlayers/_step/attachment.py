"""What `attach_kd` added to a student: KD layers, train-only parameters, and their state."""

from collections.abc import Iterator
from typing import Any

from torch import nn

from kdlayers._layer.layer import KDLayer
from kdlayers._step.sites import inserts, slots
from kdlayers._step.state import load_state, state_of
from kdlayers._step.summary import summarise
from kdlayers._step.tape import Tape
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Term


class Attachment:
    """Base of `KDHandle`: what it holds, apart from the training step."""

    student: nn.Module
    step: int
    _teachers: list[Teacher]
    _terms: list[Term]
    _tape: Tape
    _fitted: bool

    def parameters(self) -> Iterator[nn.Parameter]:
        """Train-only parameters of the losses, for the optimiser; none of them is the student's."""
        seen: set[nn.Parameter] = set()
        for term in self._terms:
            for parameter in term.loss.parameters():
                if parameter.requires_grad and parameter not in seen:
                    seen.add(parameter)
                    yield parameter

    def added_parameters(self, *, decay: bool | None = None) -> list[nn.Parameter]:
        """All parameters that attach_kd added: of the KD layers, and the train-only ones.

        For a script that has made its optimiser before, or wants another rate for them::

            optimizer.add_param_group({"params": kd.added_parameters()})

        or, without weight decay on scales, norms and biases::

            matrices, others = (kd.added_parameters(decay=decay) for decay in (True, False))
            optimizer.add_param_group({"params": matrices})
            optimizer.add_param_group({"params": others, "weight_decay": 0.0})

        Add the groups before a learning-rate scheduler is made. An optimiser made after attach_kd
        from ``student.parameters()`` holds the KD layers' already; it needs :meth:`parameters`.

        Args:
            decay: ``True``: only matrices, which weight decay suits; ``False``: only scales, norms
                and biases; ``None`` (default): all.

        Returns:
            The parameters that require a gradient, those of the layers first.
        """
        inside = [p for layer in self.layers.values() for p in layer.parameters()]
        whole = dict.fromkeys([p for p in inside if p.requires_grad])
        whole.update(dict.fromkeys(self.parameters()))
        return [p for p in whole if decay is None or decay == (p.dim() > 1)]

    @property
    def layers(self) -> dict[str, KDLayer]:
        """The KD layers of this handle by the names of their points, in the student's order.

        They share the student's parameters, batch norms, ``alpha`` and ``memory``: setting
        ``kd.layers[name].alpha`` changes the student. In the student the layers act through hooks,
        and ``<point>...kd`` holds their parts. They stay after :meth:`detach`, not after
        :meth:`remove`.
        """
        found = inserts(self.student)
        own = [(hook, module) for module, _, hook in found if hook.tape is self._tape]
        return {hook.name: hook.slot(module).as_layer() for hook, module in own}

    def state_dict(self) -> dict[str, Any]:
        """Targets, train-only parameters and the step: tensors and numbers, safe to save.

        Together with the student's and the optimiser's state a resumed run goes on exactly. The
        tensors are copies, and a checksum of them is part of the state.
        """
        return state_of(self._terms, self.step)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; nothing needs to be fitted again.

        All or nothing: if it fails, every loss is as it was before.

        Raises:
            CheckpointError: if the state is of other losses, of KD layers or a teacher of other
                sizes, damaged, changed, or of an unknown version.
        """
        self.step = load_state(self._terms, self._teachers, slots(self.student), state)
        self._look_again()

    def summary(self) -> str:
        """Points, shapes, parameters and multiply-adds added, and what is fitted, as a table."""
        return summarise(self.student, self._terms)

    def __repr__(self) -> str:
        return self.summary()

    def _look_again(self) -> None:
        """Ask the losses again whether they are fitted, and where their tensors are."""
        self._fitted = False
        for term in self._terms:
            term.place = None
