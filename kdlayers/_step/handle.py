"""The handle that `attach_kd` returns: fit, loss, terms, state, detaching and removal."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn

from kdlayers._models.detectors import Pictures
from kdlayers._step.balance import Balance
from kdlayers._step.gradient_norms import gradient_norms
from kdlayers._step.hooks import end_recording, unguard_hooks
from kdlayers._step.image_statistics import ImageStatistics
from kdlayers._step.learning import Learning
from kdlayers._step.optimizer_check import OptimiserWatch, parameter_groups
from kdlayers._step.ranks import ranks_of
from kdlayers._step.replay import read_batch
from kdlayers._step.several_labels import SeveralLabels
from kdlayers._step.sites import take_out
from kdlayers._step.tape import Ahead, Forward, Tape, check_labels, check_taught, versions_of
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Pair, Plan, Term, weighted_sum
from kdlayers._utils.distributed import alone, connected
from kdlayers.errors import CaptureError, NotFittedError


class KDHandle(Learning):
    """Handle of a distillation, which :func:`kdlayers.attach_kd` returns.

    It holds the teacher, the losses with their targets and train-only parameters, and the hooks
    that record the student's forwards. It is a plain object, not a module, and no part of it
    enters the student's state dict, copies or checkpoints. Recording ends when it is deleted.
    ``copy.deepcopy((student, kd))`` copies both. The copy uses the same teacher, because it is
    frozen. If you train the teacher too, as a mean teacher, copy ``(teacher, student, kd)``.

    Attributes:
        student: the model that was given, unwrapped from ``torch.compile``; of a detector, its
            backbone.
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
        pictures: Pictures | None = None,
    ) -> None:
        self.student = student
        self.terms: dict[str, Tensor] = {}
        self.step = 0
        self._teachers = list(teachers)
        self._terms = list(terms)
        self._tape = tape
        self._pictures = pictures
        self._start()

    def _start(self) -> None:
        """Create the parts that are neither copied nor pickled, and start recording."""
        _keep_out_of_graphs()
        self._plan = Plan(self._terms, self._teachers)
        self._fitted = False
        self._untried = list(self._terms)
        self._images = ImageStatistics()
        self._balance = Balance(self._terms)
        self._several = SeveralLabels(self._terms)
        own, added = parameter_groups(self.student, self._terms)
        self._watch = OptimiserWatch(self.student, own, added)
        self._ranks = ranks_of(self._terms)
        self._tape.armed, self._tape.ranks = bool(self._terms), self._ranks
        if self._ranks is not None:
            self._ranks.start()
        self._release = finalize(self, end_recording, self.student, self._tape)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the student, the teachers and the losses, but no recordings."""
        kept = ("student", "step", "_teachers", "_terms", "_tape", "_pictures")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.terms = {}
        self._start()

    # ---------------------------------------------------------------- training

    def loss(
        self,
        targets: Tensor | None = None,
        *,
        logits: Any = None,
        recorded: Tensor | None = None,
    ) -> Tensor:
        r"""Sum of the weighted terms for the student's last training forward.

        .. math:: L = \sum_i w_i(\text{step}) \, L_i

        Runs the teacher on the same images. Add the task's own loss, such as cross-entropy,
        yourself. Each training forward is read at most once: after an error, run the student again.

        Args:
            targets: labels as the losses need them: class indices ``[B]``, or probabilities
                ``[B, classes]`` after mixup, CutMix or label smoothing.
            logits: the student's logits, if it was run inside :meth:`batch` and a loss reads them.
            recorded: the keys of the batch, if a record replaces the teachers; see :meth:`record`.

        Returns:
            A scalar tensor with gradients into the student and the train-only parameters.

        Raises:
            ArgumentTypeError: if ``targets`` is not a tensor, or requires grad (did you pass the
                logits?); if your own loss does not return a scalar tensor with a gradient.
            CaptureError: if no training forward was recorded, a KD layer did not run in it, or this
                is called under ``torch.no_grad()``.
            StaleCaptureError: if several forwards were run, the number of labels is not that of the
                images, or the batch, features or logits were changed in place since.
            NotFittedError: if :meth:`fit` has not been called.
            AttachError: if the handle has no teacher, or was detached.
            ShapeError: if the batch was empty.
            RecordError: if the record is damaged, or of other teachers, losses or images.

        Warns:
            KDLayersWarning: once, if a weighted term was more than 100 times another in each of the
                first 50 steps; terms whose weight is a function, or 0, are not compared.
        """
        compiling = torch.compiler.is_compiling()
        plan, pairs, labels, unread = self._read(targets, logits, recorded, compiling)
        total, logged, constant = weighted_sum(plan.terms, pairs, labels)
        if unread is not None:
            total = total + unread.flatten()[:0].sum().to(total)
        self._done(total, logged, pairs, constant)
        return total

    def criterion(self, criterion: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        """A script's own loss function with :meth:`loss` added to it while the student trains.

        For scripts that pass ``criterion`` to the function with their loop. In eval mode, and under
        ``torch.no_grad()``, it is the criterion alone.

        Args:
            criterion: a function of the student's output and the targets.

        Returns:
            A function of the same two, which passes the targets to :meth:`loss`.

        Example:
            >>> import torch
            >>> from torchvision.models import resnet18
            >>> from kdlayers import KDLoss, attach_kd
            >>> student, teacher = resnet18(num_classes=3), resnet18(num_classes=3)
            >>> kd = attach_kd(student, teacher, losses=[KDLoss()])
            >>> criterion = kd.criterion(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
            >>> images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
            >>> criterion(student(images), labels).backward()
        """

        def distilled(output: Any, targets: Any) -> Tensor:
            own = criterion(output, targets)
            if not self.student.training or not torch.is_grad_enabled():
                return own
            return own + self.loss(targets)

        return distilled

    def gradient_norms(
        self,
        targets: Tensor | None = None,
        *,
        task: Tensor | None = None,
        logits: Any = None,
        recorded: Tensor | None = None,
    ) -> dict[str, float]:
        """Norm of each term's gradient, to choose weights: call it instead of :meth:`loss`.

        The gradient is taken with respect to the student's parameters that every term reaches.
        ``.grad`` does not change, and the step is not counted. Run the student again before
        :meth:`loss`, because each forward is read once.

        Args:
            targets: labels; this, ``logits`` and ``recorded`` as for :meth:`loss`.
            task: your own loss of the same forward, such as ``F.cross_entropy(student(x), y)``.
            logits: those of :meth:`batch`.
            recorded: the keys of the batch.

        Returns:
            ``{name: norm}`` for every term, times its weight under ``name + ".weighted"``, and
            ``"task"`` if it was given.

        Raises:
            ArgumentTypeError: if ``task`` is not a scalar tensor with a gradient.
            ArgumentError: if no parameter is reached by all of them, or FSDP has sharded the
                student; also as :meth:`loss`.
        """
        plan, pairs, labels, _ = self._read(targets, logits, recorded, compiling=False)
        with alone(), nullcontext() if self._ranks is None else self._ranks.pause():
            return gradient_norms(self.student, plan.terms, pairs, labels, task)

    @contextmanager
    def batch(self, *args: Any, **kwargs: Any) -> Generator[None, None, None]:
        """Record the student's forward in the block, for code that does not call ``student(x)``.

        Use it around ``student.forward``, timm's ``forward_features`` and ``forward_head``, or a
        student that is part of a larger model. Pass the inputs as ``student(...)`` would get them:
        the teacher gets them too. Then call ``kd.loss(y, logits=...)``; losses on features need no
        ``logits``.
        """
        self._need_teacher("batch")
        tape = self._tape
        tape.consume()
        tape.forward = Forward(args, kwargs, copies=tape.copies)
        tape.manual = tape.active = True
        try:
            yield
            tape.done = 1
        finally:
            if not tape.done:
                tape.fail()
            tape.manual = tape.active = False

    def teach(self, *args: Any, **kwargs: Any) -> None:
        """Run the teacher on a batch now, before the student, to lower peak memory.

        The teacher's activations are freed before the student's are made; only the tensors that
        the losses read are kept, for the next :meth:`loss`. Calling it is optional.

        Raises:
            StaleCaptureError: in :meth:`loss`, if the student was run on other tensors.
        """
        self._need_teacher("teach")
        versions = versions_of(args, kwargs)
        self._tape.ahead = Ahead(args, kwargs, versions, self._plan.teach(args, kwargs))

    def clear(self) -> None:
        """Forget recorded forwards; call it after a training forward without :meth:`loss`."""
        self._tape.fail()
        self._tape.consume()

    # ---------------------------------------------------------------- detaching and removal

    def detach(self) -> None:
        """Remove the teacher, the recording and the train-only parts; the KD layers stay."""
        self._release()
        self._teachers, self._terms, self.terms = [], [], {}
        self._plan, self._ranks, self._untried = Plan((), ()), None, []
        self._watch = OptimiserWatch(None, (), {})

    def remove(self) -> None:
        """Like :meth:`detach`, and also remove the KD layers, which restores the student."""
        self.detach()
        take_out(self.student, self._tape)
        unguard_hooks()

    # ---------------------------------------------------------------- inside

    def _need_fitted(self) -> None:
        unfitted = [term.name for term in self._terms if not term.loss.fitted]
        if unfitted:
            verb = "is" if len(unfitted) == 1 else "are"
            raise NotFittedError(
                f"{', '.join(unfitted)} {verb} not fitted yet; call kd.fit(loader) once before "
                "training, or kd.load_state_dict(...) when you resume"
            )
        self._fitted = True

    def _read(
        self, targets: Tensor | None, logits: Any, recorded: Tensor | None, compiling: bool
    ) -> tuple[Plan, list[Pair], Tensor | None, Tensor | None]:
        """The tensors that the terms compare, the labels, and logits that the sum must reach.

        Runs the teacher.
        """
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
        # A student may return its own loss, one number, or a vector of its parts.
        images = found if self._plan.wanted.logits else forward.any_recorded()
        labels = check_labels(targets, images)
        if self._several.names and labels is not None:
            self._several.look(labels)
        if not self._images.done:
            self._images.of_training((forward.args, forward.kwargs))
        plan = self._plan
        if recorded is not None:
            plan, tensors = read_batch(plan, recorded, forward, images, self.step)
        elif ahead is None:
            autocast = forward.autocast_dtype(self.student, found)
            tensors = plan.of_teachers(plan.teach(forward.args, forward.kwargs, autocast))
        else:
            check_taught(forward, ahead)
            tensors = plan.of_teachers(ahead.taught)
        pairs = plan.pairs(forward, found, tensors, self.step)
        if self._watch.unjudged:
            weighted = zip(self._terms, pairs, strict=True)
            self._watch.look([term.name for term, pair in weighted if pair.weight])
        if compiling:  # tensors: a compiled sum does not depend on their values
            for pair in pairs:
                pair.weight = torch.tensor(pair.weight, dtype=torch.float64, device="cpu")
        # DDP and FSDP reduce gradients only in a backward pass through the student's output.
        unread = found if not plan.wanted.logits and connected() else None
        return plan, pairs, labels, unread

    def _done(
        self,
        total: Tensor,
        logged: dict[str, Tensor],
        pairs: Sequence[Pair],
        constant: Sequence[str],
    ) -> None:
        if self._untried:
            self._check_gradients(pairs, constant)
        if self._ranks is not None:
            self._ranks.average_after(total)
        if self._balance.names:
            self._balance.look(logged)
        self.terms = logged
        self.step += 1

    def _check_gradients(self, pairs: Sequence[Pair], constant: Sequence[str]) -> None:
        """Raise for a weighted term without a gradient.

        A term that had one in an earlier step passes: it may be a constant for some batches.
        """
        self._untried = [term for term in self._untried if term.name in constant]
        weights = {term.name: pair.weight for term, pair in zip(self._terms, pairs, strict=True)}
        for term in self._untried:
            if weights[term.name]:
                raise term.without_gradient()


def _keep_out_of_graphs() -> None:
    """Exclude a step's checks and its teacher from torch.compile.

    Called when the first handle is made, because it imports the compiler, which takes long.
    """
    for name in ("_read", "_done"):
        method = getattr(KDHandle, name)
        if not hasattr(method, "_torchdynamo_disable"):
            setattr(KDHandle, name, torch.compiler.disable(method))
