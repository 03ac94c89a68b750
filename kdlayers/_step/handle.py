"""The handle that `attach_kd` returns: fit, loss, terms, state, and the ways out."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from kdlayers._layer.layer import KDLayer
from kdlayers._models.trace import image_size
from kdlayers._models.undisturbed import cuda_devices
from kdlayers._step import captures
from kdlayers._step.added import layers_of, parameters_of
from kdlayers._step.batches import check_loader, labels_for, split_batch
from kdlayers._step.hooks import Ahead, Tape, version_of
from kdlayers._step.image_statistics import ImageStatistics
from kdlayers._step.optimizer_check import OptimiserWatch
from kdlayers._step.other_teacher import remember
from kdlayers._step.sites import slots, take_out
from kdlayers._step.summary import summarise
from kdlayers._step.teacher import Taught, Teacher
from kdlayers._step.terms import Inputs, Term, weighted_sum
from kdlayers._targets.fitter import Fitter, pass_seed, run_passes
from kdlayers._targets.passes import Passes
from kdlayers._utils.distributed import keep_in_step, world_size
from kdlayers._utils.eager import eager, prepare
from kdlayers.errors import (
    AttachError,
    CheckpointError,
    NotFittedError,
)

STATE_VERSION = 1


class KDHandle:
    """Everything about a distillation that is not the student: made by :func:`kdlayers.attach_kd`.

    It holds the teacher, the losses with their targets and train-only parameters, and the hooks
    that record the student's forwards. It is a plain object, not a module: nothing of it gets into
    the student's state dict, copies or checkpoints. Dropping it ends the recording.

    Attributes:
        student: the model that was given, unwrapped from ``torch.compile``.
        terms: the last :meth:`loss` as ``{name: detached tensor}``: each term as computed under its
            name, with its weight under ``name + ".weighted"``, the losses' own metrics under
            ``name + "." + metric``, and the sum under ``"total"``.
        step: number of calls of :meth:`loss` so far, which weights and schedules are functions of.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import CodebookTargets, KDPoint, attach_kd
        >>> student, teacher = resnet18(num_classes=4), resnet18(num_classes=4)
        >>> images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3])
        >>> kd = attach_kd(student, teacher, [KDPoint("layer4", targets=CodebookTargets(8))])
        >>> kd.fit([(images, labels)])
        >>> loss = torch.nn.functional.cross_entropy(student(images), labels) + kd.loss(labels)
        >>> sorted(kd.terms)
        ['TemplateLoss.layer4', 'TemplateLoss.layer4.weighted', 'total']
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[Teacher],
        terms: Sequence[Term],
        tape: Tape,
        hooks: Sequence[Any],
    ) -> None:
        prepare()
        self.student = student
        self.terms: dict[str, Tensor] = {}
        self.step = 0
        self._teachers = list(teachers)
        self._terms = list(terms)
        self._tape = tape
        self._release = finalize(self, _release, tape, list(hooks))
        self._in_step = False
        self._images = ImageStatistics()
        self._keep_in_step()
        own, added = _parameter_groups(student, self._terms)
        self._watch = OptimiserWatch(own, added)

    # ---------------------------------------------------------------- training

    def fit(
        self,
        loader: Iterable[Any],
        *,
        seed: int = 0,
        progress: bool = True,
        refit: bool = False,
    ) -> None:
        """Learn from the teacher what the losses need: codebooks, decisions, auto-encoders.

        Runs the teacher over the loader, one pass for all points together: a codebook takes up to
        two passes, decisions up to four, an auto-encoder its ``epochs``. The student is not run,
        and no random state is disturbed. While a codebook or decisions are learnt each pass starts
        from ``seed``, so that a loader that shuffles or augments gives every pass the same data:
        torch, Python's ``random``, NumPy and the generators that the loader, its samplers and its
        data set hold are seeded, and restored at the end. Workers start anew in each pass.
        Passes that only auto-encoders are left to take start from ``seed`` plus the number of the
        pass: as in any training order and augmentation change; the same seed gives the same again.
        Under ``torch.distributed`` all ranks call it together, each with its part of the data.

        Args:
            loader: gives batches ``(images, labels)``; the training images without augmentation. It
                must be iterable again, as a ``DataLoader`` or a list is.
            seed: seed of clustering and of the loader's own randomness; default 0.
            progress: show a bar on a terminal, where tqdm is installed; default True.
            refit: also learn again what has been learnt; default: only what is missing.

        Raises:
            FitError: if the loader is empty or one-shot, or the data cannot be learnt from.
            ArgumentTypeError: if ``loader`` is nothing that gives batches, such as a model.
            ArgumentError: if a batch is no pair of tensors.
            CaptureError: if the teacher cannot run on a batch.

        Warns:
            KDLayersWarning: if passes that need the same data began with different batches; at the
                first training batches after it, if their images are not normalised alike.
        """
        self._need_teacher("fit")
        check_loader(loader)
        self._keep_in_step()
        wanted = [term for term in self._terms if refit or not term.loss.fitted]
        pairs = [(term, term.loss.fitter(seed=seed)) for term in wanted]
        fitters = {id(fitter): (term, fitter) for term, fitter in pairs if fitter is not None}
        devices = {d for teacher in self._teachers for d in cuda_devices(teacher.model)}

        def batches(active: Sequence[Fitter], index: int) -> Iterator[Any]:
            terms = [fitters[id(fitter)][0] for fitter in active]
            title = f"fit, pass {index + 1}: {', '.join({f.stage: None for f in active})}"
            start = pass_seed(seed, active, index)
            for batch in passes.batches(start, title, progress=progress):
                images, labels = split_batch(batch)
                if index == 0:
                    self._images.of_fit(images)
                yield self._teacher_tensors(terms, images), labels

        if fitters:
            self._images.begin_fit()
        with Passes(loader, devices) as passes:
            run_passes([fitter for _, fitter in fitters.values()], batches)
        remember([term for term, _ in fitters.values()], self._teachers)

    def loss(self, targets: Tensor | None = None, *, logits: Any = None) -> Tensor:
        r"""Sum of the weighted terms for the student's last training forward.

        .. math:: L = \sum_i w_i(\text{step}) \, L_i

        Runs the teacher on the same images. The task's own loss, such as cross-entropy, stays
        yours. Each training forward is read once.

        Args:
            targets: labels as the losses need them: class indices ``[B]``, or probabilities
                ``[B, classes]`` after mixup, CutMix or label smoothing.
            logits: the student's logits, if it was run inside :meth:`batch`.

        Returns:
            A scalar tensor with gradients into the student and the train-only parameters.

        Raises:
            ArgumentTypeError: if ``targets`` have a gradient, as the student's logits do.
            CaptureError: if no training forward was recorded, or a KD layer did not run in it.
            StaleCaptureError: if several forwards were run, or the batch was changed since.
            NotFittedError: if :meth:`fit` has not been called.
        """
        inputs = self._inputs(targets, logits)
        total, logged = weighted_sum(self._terms, inputs)
        self._done(logged)
        return total

    @contextmanager
    def batch(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Record whatever the student does inside, for runs that are no call ``student(x)``.

        Use it round ``student.forward``, timm's ``forward_features`` and ``forward_head``, or a
        student that is part of a larger model; the arguments are the teacher's inputs. Then call
        ``kd.loss(y, logits=...)``.
        """
        self._need_teacher("batch")
        tape = self._tape
        tape.consume()
        tape.open(args, kwargs)
        tape.manual = tape.active = True
        try:
            yield
            tape.done = 1
        finally:
            if not tape.done:
                tape.fail()
            tape.manual = tape.active = False

    def teach(self, *args: Any, **kwargs: Any) -> None:
        """Run the teacher on a batch now, before the student, to lower the peak of memory.

        The teacher's activations are freed before the student's are made; only the tensors that
        the losses read are kept, for the next :meth:`loss`. Calling it is optional.

        Raises:
            StaleCaptureError: in :meth:`loss`, if the student was run on other tensors.
        """
        self._need_teacher("teach")
        taught = self._run_teachers(self._terms, args, kwargs)
        self._tape.ahead = Ahead(args, version_of(args), taught)

    def clear(self) -> None:
        """Forget recorded forwards, after a training forward whose KD loss is not wanted."""
        self._tape.fail()
        self._tape.consume()

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
        return parameters_of(self.layers.values(), self.parameters(), decay)

    @property
    def layers(self) -> dict[str, KDLayer]:
        """The KD layers of this handle by the names of their points, in the student's order.

        They are there after :meth:`detach` too, and gone after :meth:`remove`.
        """
        return layers_of(self.student, self._tape)

    # ---------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Targets, train-only parameters and the step: tensors and numbers, safe to save.

        Together with the student's and the optimiser's state a resumed run goes on exactly.
        """
        losses = {term.name: term.loss.state_dict() for term in self._terms}
        return {"version": STATE_VERSION, "step": self.step, "losses": losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave; nothing needs to be fitted again.

        Raises:
            CheckpointError: if the state is of other losses, damaged, or of an unknown version.
        """
        if not isinstance(state, dict) or state.get("version") != STATE_VERSION:
            found = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise CheckpointError(
                f"this is no state of a KDHandle of version {STATE_VERSION} (found {found!r}); "
                "pass what kd.state_dict() returned"
            )
        losses, step = state.get("losses"), state.get("step")
        if not isinstance(losses, dict) or not isinstance(step, int):
            raise CheckpointError(
                "the state of a KDHandle is damaged: it has no losses or no step; pass what "
                "kd.state_dict() returned"
            )
        ours, theirs = [term.name for term in self._terms], list(losses)
        if set(ours) != set(theirs):
            raise CheckpointError(
                f"the state holds the losses {theirs}, but this handle has {ours}; attach with the "
                "same points and losses as when it was saved"
            )
        for term in self._terms:
            _load(term, losses[term.name])
        self.step = step

    def summary(self) -> str:
        """Points, shapes, parameters and multiply-adds added, and what is fitted, as a table."""
        return summarise(self.student, self._terms)

    def __repr__(self) -> str:
        return self.summary()

    # ---------------------------------------------------------------- ways out

    def detach(self) -> None:
        """Let go of teacher, captures and train-only parts; the student keeps its KD layers."""
        self._release()
        self._teachers, self._terms, self.terms = [], [], {}
        self._watch = OptimiserWatch((), {})

    def remove(self) -> None:
        """As :meth:`detach`, and take the KD layers out: the student is as it was before."""
        self.detach()
        take_out(self.student, self._tape)

    # ---------------------------------------------------------------- inside

    def _need_teacher(self, method: str) -> None:
        if not self._teachers:
            raise AttachError(
                f"kd.{method}() needs a teacher: this handle was detached, or attached with "
                "teacher=None; call attach_kd(student, teacher, ...) again after kd.remove()"
            )

    def _keep_in_step(self) -> None:
        """Put the train-only parameters in step, once the processes are connected."""
        if not self._in_step and world_size() > 1:
            keep_in_step(self.parameters())
            self._in_step = True

    def _teach(self, record: captures.Record, ahead: Ahead | None) -> list[Taught]:
        if ahead is not None:
            captures.check_same(record, ahead.args, ahead.version)
            return ahead.taught
        autocast = record.autocast_dtype(self.student)
        return self._run_teachers(self._terms, record.args, record.kwargs, autocast)

    def _run_teachers(
        self,
        terms: Sequence[Term],
        args: Sequence[Any],
        kwargs: dict[str, Any],
        autocast: torch.dtype | None = None,
    ) -> list[Taught]:
        """What the terms read of each teacher, from one forward no deeper than they need."""
        taught: list[Taught] = []
        for index, teacher in enumerate(self._teachers):
            read = (term.tap for term in terms if term.tap is not None and term.reads(index))
            logits = any(term.reads_logits(index) for term in terms)
            taps = list(dict.fromkeys(read))
            taught.append(teacher.run(args, kwargs, taps, autocast, logits=logits))
        return taught

    def _teacher_tensors(self, terms: Sequence[Term], images: Any) -> list[Tensor]:
        args = images if isinstance(images, tuple) else (images,)
        taught = self._run_teachers(terms, args, {})
        found = [term.teacher_tensor(self._teachers, taught) for term in terms]
        return [term.teacher_alone(tensor) for term, tensor in zip(terms, found, strict=True)]

    @eager
    def _inputs(self, targets: Tensor | None, logits: Any) -> Inputs:
        """What the terms of the last forward are computed from; the teacher runs here."""
        self._need_teacher("loss")
        self._keep_in_step()
        unfitted = [term.name for term in self._terms if not term.loss.fitted]
        if unfitted:
            raise NotFittedError(
                f"{', '.join(unfitted)} has not learnt from the teacher yet; call kd.fit(loader) "
                "once before training, or kd.load_state_dict(...) when you resume"
            )
        ahead, self._tape.ahead = self._tape.ahead, None
        keys = {term.key for term in self._terms if term.key is not None}
        reads_logits = any(term.key is None for term in self._terms)
        record = captures.read(self._tape, keys, self.student, logits, reads_logits=reads_logits)
        image = image_size((record.args, record.kwargs))
        targets = labels_for(targets, record.logits)
        self._images.of_training((record.args, record.kwargs))
        taught = self._teach(record, ahead)
        pairs = []
        for term in self._terms:
            student = record.logits if term.key is None else record.features[term.key]
            if term.student_layout is not None:
                student = term.student_layout.on_grid(student, image)
            _follow(term.loss, student.device)
            pairs.append((student, term.teacher_tensor(self._teachers, taught)))
        # Tensors: a compiled sum does not depend on their values.
        weights = {term.name: term.loss.weight_at(self.step) for term in self._terms}
        self._watch.look([name for name, weight in weights.items() if weight])
        values = torch.tensor(list(weights.values()), dtype=torch.float64)
        return Inputs(pairs, list(values), targets, record.features)

    @eager
    def _done(self, logged: dict[str, Tensor]) -> None:
        self.terms = logged
        self.step += 1


def _release(tape: Tape, hooks: Sequence[Any]) -> None:
    """End the recording; called by `detach`, and when the handle is garbage."""
    tape.fail()
    tape.consume()
    tape.armed = tape.active = False
    for hook in hooks:
        hook.remove()


def _load(term: Term, state: dict[str, Any]) -> None:
    try:
        term.loss.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"the state of {term.name} does not fit: {error}") from error


def _parameter_groups(
    student: nn.Module, terms: Iterable[Term]
) -> tuple[list[nn.Parameter], dict[str, list[nn.Parameter]]]:
    """The student's own parameters, and by term those that attach_kd added."""
    layers = slots(student)
    new = {id(p) for slot in layers.values() for p in slot.parameters()}
    own = [p for p in student.parameters() if id(p) not in new]
    added: dict[str, list[nn.Parameter]] = {}
    for term in terms:
        added[term.name] = list(term.loss.parameters())
        if term.scores and term.point in layers:
            # The loss alone reaches the templates whatever alpha is.
            added[term.name].append(layers[term.point].head.weight)
    return own, added


def _follow(loss: nn.Module, device: torch.device) -> None:
    """Move the loss to the student's device; parameters keep their identity for the optimiser."""
    tensors = (*loss.parameters(), *loss.buffers())
    if any(tensor.device != device for tensor in tensors):
        loss.to(device)
