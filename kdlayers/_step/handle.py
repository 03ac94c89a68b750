"""The handle that `attach_kd` returns: fit, loss, terms, state, and the ways out."""

from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from kdlayers._layer.layer import KDLayer
from kdlayers._models.undisturbed import cuda_devices
from kdlayers._step.added import layers_of, parameters_of
from kdlayers._step.batches import check_loader, split_batch
from kdlayers._step.gradient_norms import gradient_norms
from kdlayers._step.hooks import drop_recording, unguard_hooks
from kdlayers._step.image_statistics import ImageStatistics
from kdlayers._step.optimizer_check import OptimiserWatch
from kdlayers._step.plan import Plan
from kdlayers._step.ranks import Ranks
from kdlayers._step.sites import slots, take_out
from kdlayers._step.state import load_state, state_of
from kdlayers._step.summary import summarise
from kdlayers._step.tape import Forward, Tape, check_labels, check_taught, versions_of
from kdlayers._step.teacher import Taught, Teacher
from kdlayers._step.terms import Pair, Term, weighted_sum
from kdlayers._targets.fitter import Fitter, pass_seed, run_passes
from kdlayers._targets.passes import Passes
from kdlayers.errors import (
    AttachError,
    CaptureError,
    NotFittedError,
)


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
    ) -> None:
        self.student = student
        self.terms: dict[str, Tensor] = {}
        self.step = 0
        self._teachers = list(teachers)
        self._terms = list(terms)
        self._tape = tape
        self._start()

    def _start(self) -> None:
        """Make what is not copied or pickled along, and start to record."""
        _keep_out_of_graphs()
        self._plan = Plan(self._terms, self._teachers)
        self._fitted = False
        self._images = ImageStatistics()
        own, added = _parameter_groups(self.student, self._terms)
        self._watch = OptimiserWatch(own, added)
        self._ranks = _ranks(self._terms)
        self._tape.armed, self._tape.ranks = bool(self._terms), self._ranks
        if self._ranks is not None:
            self._ranks.start()
        self._release = finalize(self, _release, self.student, self._tape)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the student, the teachers and the losses, and record anew."""
        kept = ("student", "step", "_teachers", "_terms", "_tape")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.terms = {}
        self._start()

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
        if self._ranks is not None:
            self._ranks.start()
        wanted = [term for term in self._terms if refit or not term.loss.fitted]
        pairs = [(term, term.loss.fitter(seed=seed)) for term in wanted]
        fitters = {id(fitter): (term, fitter) for term, fitter in pairs if fitter is not None}
        devices = {d for teacher in self._teachers for d in cuda_devices(teacher.model)}

        def batches(active: Sequence[Fitter], index: int) -> Iterator[Any]:
            plan = Plan([fitters[id(fitter)][0] for fitter in active], self._teachers)
            title = f"fit, pass {index + 1}: {', '.join({f.stage: None for f in active})}"
            start = pass_seed(seed, active, index)
            for batch in passes.batches(start, title, progress=progress):
                images, labels = split_batch(batch)
                if index == 0:
                    self._images.of_fit(images)
                args = images if isinstance(images, tuple) else (images,)
                tensors = plan.of_teachers(plan.teach(args, {}))
                found = zip(plan.terms, tensors, strict=True)
                yield [term.teacher_alone(tensor) for term, tensor in found], labels

        if fitters:
            self._images.begin_fit()
        with Passes(loader, devices) as passes:
            run_passes([fitter for _, fitter in fitters.values()], batches)
        for term, _ in fitters.values():
            term.remember(self._teachers)
        self._look_again()

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
            CaptureError: if no training forward was recorded, a KD layer did not run in it, or this
                is called under ``torch.no_grad()``.
            StaleCaptureError: if several forwards were run, or the batch, features or logits were
                changed in place since.
            NotFittedError: if :meth:`fit` has not been called.
            ShapeError: if the batch was empty.
        """
        compiling = torch.compiler.is_compiling()
        pairs, labels = self._read(targets, logits, compiling)
        total, logged = weighted_sum(self._terms, pairs, labels)
        self._done(total, logged)
        return total

    def gradient_norms(
        self, targets: Tensor | None = None, *, task: Tensor | None = None, logits: Any = None
    ) -> dict[str, float]:
        """Norm of each term's gradient, to choose weights: call it for a batch, in place of `loss`.

        Norms are over the student's parameters that every term reaches. ``.grad`` stays as it is,
        the step is not counted, and the forward is read, so run the student again for a step.

        Args:
            targets: labels, as for :meth:`loss`.
            task: your own loss of the same forward, such as ``F.cross_entropy(student(x), y)``.
            logits: the student's logits, if it was run inside :meth:`batch`.

        Returns:
            ``{name: norm}`` for every term, times its weight under ``name + ".weighted"``, and
            ``"task"`` if it was given.

        Raises:
            ArgumentTypeError: if ``task`` is not a scalar tensor with a gradient.
            ArgumentError: if no parameter is reached by all of them; also as :meth:`loss`.
        """
        pairs, labels = self._read(targets, logits, compiling=False)
        return gradient_norms(self.student, self._terms, pairs, labels, task)

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
        tape.forward = Forward(args, kwargs)
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
        versions = versions_of(args, kwargs)
        self._tape.ahead = Ahead(args, kwargs, versions, self._plan.teach(args, kwargs))

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

        They share the student's parameters and batch norms; their ``alpha`` and ``memory`` are the
        values of now. In the student the layers act through hooks, and ``<point>...kd`` holds their
        parts. They are there after :meth:`detach` too, and gone after :meth:`remove`.
        """
        return layers_of(self.student, self._tape)

    # ---------------------------------------------------------------- state

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

    # ---------------------------------------------------------------- ways out

    def detach(self) -> None:
        """Let go of teacher, captures and train-only parts; the student keeps its KD layers."""
        self._release()
        self._teachers, self._terms, self.terms = [], [], {}
        self._plan, self._ranks = Plan((), ()), None
        self._watch = OptimiserWatch((), {})

    def remove(self) -> None:
        """As :meth:`detach`, and take the KD layers out: the student is as it was before."""
        self.detach()
        take_out(self.student, self._tape)
        unguard_hooks()

    # ---------------------------------------------------------------- inside

    def _need_teacher(self, method: str) -> None:
        if not self._teachers:
            raise AttachError(
                f"kd.{method}() needs a teacher: this handle was detached, or attached with "
                "teacher=None; call attach_kd(student, teacher, ...) again after kd.remove()"
            )

    def _look_again(self) -> None:
        """Ask the losses again whether they are fitted, and where their tensors are."""
        self._fitted = False
        for term in self._terms:
            term.place = None

    def _need_fitted(self) -> None:
        unfitted = [term.name for term in self._terms if not term.loss.fitted]
        if unfitted:
            raise NotFittedError(
                f"{', '.join(unfitted)} has not learnt from the teacher yet; call kd.fit(loader) "
                "once before training, or kd.load_state_dict(...) when you resume"
            )
        self._fitted = True

    def _read(
        self, targets: Tensor | None, logits: Any, compiling: bool
    ) -> tuple[list[Pair], Tensor | None]:
        """What the terms of the last forward compare, and the labels; the teacher runs here."""
        if not self._teachers:
            self._need_teacher("loss")
        if not self._fitted:
            self._need_fitted()
        if not torch.is_grad_enabled():
            raise CaptureError(
                "kd.loss(y) was called under torch.no_grad() or inference_mode(), where it would "
                "have no gradient; call it outside, and read values to log from kd.terms"
            )
        if self._ranks is not None:
            self._ranks.start()
        tape = self._tape
        ahead, tape.ahead = tape.ahead, None
        forward, found = tape.read(self._plan.wanted, self.student, logits)
        labels = check_labels(targets, found)
        self._images.of_training((forward.args, forward.kwargs))
        if ahead is None:
            autocast = forward.autocast_dtype(self.student, found)
            taught = self._plan.teach(forward.args, forward.kwargs, autocast)
        else:
            check_taught(forward, ahead)
            taught = ahead.taught
        pairs = self._plan.pairs(forward, found, taught, self.step)
        if self._watch.unjudged:
            weighted = zip(self._terms, pairs, strict=True)
            self._watch.look([term.name for term, pair in weighted if pair.weight])
        if compiling:  # tensors: a compiled sum does not depend on their values
            for pair in pairs:
                pair.weight = torch.tensor(pair.weight, dtype=torch.float64)
        return pairs, labels

    def _done(self, total: Tensor, logged: dict[str, Tensor]) -> None:
        if self._ranks is not None:
            self._ranks.average_after(total)
        self.terms = logged
        self.step += 1


@dataclass
class Ahead:
    """What ``kd.teach`` learnt before the student runs, and of which inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int | None]
    taught: list[Taught]


def _keep_out_of_graphs() -> None:
    """Let torch.compile leave a step's checks and its teacher alone.

    Done when the first handle is made, because it imports the compiler, which takes long.
    """
    for name in ("_read", "_done"):
        method = getattr(KDHandle, name)
        if not hasattr(method, "_torchdynamo_disable"):
            setattr(KDHandle, name, torch.compiler.disable(method))


def _ranks(terms: Sequence[Term]) -> Ranks | None:
    """What keeps the train-only parameters equal over the ranks; None if there are none."""
    owners = {term.name: list(term.loss.parameters()) for term in terms}
    parameters = list(dict.fromkeys(p for group in owners.values() for p in group))
    names = [name for name, group in owners.items() if group]
    return Ranks(parameters, names) if parameters else None


def _release(student: nn.Module, tape: Tape) -> None:
    """End the recording; called by `detach`, and when the handle is garbage."""
    tape.fail()
    tape.consume()
    tape.armed, tape.ranks = False, None
    drop_recording(student, tape)


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
