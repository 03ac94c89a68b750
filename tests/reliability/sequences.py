"""Random sequences of calls, against a simple model of what each must do.

The model knows which forwards are open, what was changed in place, what is fitted and attached.
After every call it says whether the call must work or be refused in words. A loss that works is
compared with the same loss written out from what the student's modules returned.
"""

import copy
import random
import sys
from collections import Counter
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd
from kdlayers.errors import KDLayersError
from tests.nets import Net, batch

SIZES = (6, 4, 6)
LENGTH = 16


class Seen:
    """One training forward: what went in, what the modules returned, what has changed since."""

    def __init__(self, images: Tensor, index: int, logits: Tensor, first: Tensor, last: Tensor):
        self.images = images
        self.index = index
        self.logits = logits
        self.kept = logits.clone()  # as it was, whatever happens to the logits
        self.first, self.last = first, last
        self.images_changed = self.logits_changed = False
        self.logits_seen = self.open = True


class Sequence:
    """A student, a teacher and a handle, and the model of what they must do."""

    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        torch.manual_seed(seed)
        self.student, self.teacher = Net(3), Net(4)
        self.counts: Counter[str] = Counter()
        self.log: list[str] = []
        self.labels = [batch(size, seed=i)[1] for i, size in enumerate(SIZES)]
        self.images = [batch(size, seed=i)[0] for i, size in enumerate(SIZES)]
        self.returned: dict[str, Tensor] = {}
        self.teacher.train(self.draw.random() < 0.5)
        self.kd = None
        self.saved = None
        self.layers = self.attached = self.fitted = False
        self.forwards: list[Seen] = []  # since the last loss that read or cleared
        self.last: Seen | None = None
        self.ahead: tuple[Tensor, int] | None = None
        self.ahead_changed = False
        self.step = 0

    # ------------------------------------------------------------ the calls

    def run(self) -> None:
        """A sequence that begins with attach."""
        self.attach()
        names = [n for n, weight in CALLS.items() for _ in range(weight)]
        for _ in range(LENGTH):
            name = self.draw.choice(names)
            getattr(self, name)()
            self.unharmed()

    def attach(self) -> None:
        point = KDPoint("last", targets=CodebookTargets(num_templates=3))
        losses = [KDLoss(weight=0.7), FitNetLoss(at="first", weight=lambda step: 1.0 + step)]
        with self.expecting("attach", works=not self.layers):
            self.kd = attach_kd(
                self.student, self.teacher, [point], losses=losses, example=self.images[0]
            )
            self.layers = self.attached = True
            self.fitted, self.step, self.saved = False, 0, None
            self.forget()
            for name, module in (("first", self.student.first), ("last", self.student.last[-1])):
                module.register_forward_hook(self.keep(name), prepend=True)

    def keep(self, name: str):
        returned = self.returned
        return lambda _module, _args, output: returned.__setitem__(name, output)

    def fit(self) -> None:
        loader = [(self.images[i].detach().clone(), self.labels[i]) for i in (0, 2)]
        with self.expecting("fit", works=self.attached):
            self.kd.fit(loader, progress=False, refit=self.draw.random() < 0.3)
            self.fitted = True

    def forward(self) -> None:
        index = self.draw.randrange(len(SIZES))
        images = self.images[index]
        records = self.attached and self.student.training
        with self.expecting(f"forward {index}", works=True):
            logits = self.student(images)
            if records:
                self.last = Seen(images, index, logits, *self.returned.values())
                self.forwards.append(self.last)

    def forward_without_gradient(self) -> None:
        with self.expecting("no_grad forward", works=True), torch.no_grad():
            self.student(self.images[0])

    def forward_that_fails(self) -> None:
        self.log.append("failing forward")
        try:
            self.student(self.images[0][:, :2])
        except RuntimeError:
            if self.attached and self.student.training:
                self.last, self.ahead = None, None

    def inside_batch(self) -> None:
        """``kd.batch`` round a forward that the hooks of the student do not see."""
        index = self.draw.randrange(len(SIZES))
        images = self.images[index]
        with self.expecting(f"batch {index}", works=self.attached):
            with self.kd.batch(images):
                logits = self.student.forward(images)
            self.forwards.clear()
            seen = Seen(images, index, logits, *self.returned.values())
            seen.logits_seen = False
            self.last = seen
            self.forwards.append(seen)
            self.call_loss(index, logits=logits)

    def loss(self) -> None:
        near = self.last.index if self.last is not None else 0
        self.call_loss(near if self.draw.random() < 0.8 else self.draw.randrange(len(SIZES)))

    def call_loss(self, index: int, logits: Tensor | None = None) -> None:
        labels, seen = self.labels[index], self.last
        reaches = self.attached and self.fitted
        works = reaches and seen is not None and [f for f in self.forwards if f.open] == [seen]
        works = works and not seen.images_changed
        works = works and (logits is not None or (seen.logits_seen and not seen.logits_changed))
        works = works and len(labels) == len(seen.images)
        if self.ahead is not None:
            works = works and self.ahead[0] is seen.images and not self.ahead_changed
        found = None
        with self.expecting(f"loss {index}", works=works):
            found = self.kd.loss(labels, logits=logits)
        if found is not None and works:
            self.compare(found, seen)
            self.step += 1
            if self.draw.random() < 0.7:
                self.update(found, seen, labels)
        if reaches:
            self.forget()

    def update(self, loss: Tensor, seen: Seen, labels: Tensor) -> None:
        """A step of the optimiser, as in a training loop."""
        parameters = [*self.student.parameters(), *self.kd.parameters()]
        optimiser = torch.optim.SGD(parameters, lr=0.01)
        (F.cross_entropy(seen.kept, labels) + loss).backward()
        optimiser.step()
        optimiser.zero_grad()

    def loss_under_no_grad(self) -> None:
        with self.expecting("no_grad loss", works=False), torch.no_grad():
            self.kd.loss(self.labels[0])

    def backward_without_the_loss(self) -> None:
        """A step that does not ask for the KD loss closes its forward."""
        changed = [f for f in self.forwards if f.images_changed or f.logits_changed]
        left = [f for f in self.forwards if f.open and f.logits_seen and f not in changed]
        if not left:
            return
        seen = self.draw.choice(left)
        with self.expecting("backward", works=True):
            F.cross_entropy(seen.logits, self.labels[seen.index]).backward()
            self.student.zero_grad()
        seen.open = False
        if seen is self.last:
            self.last = None

    def teach(self) -> None:
        images = self.images[self.last.index if self.last else self.draw.randrange(len(SIZES))]
        with self.expecting("teach", works=self.attached):
            self.kd.teach(images)
            self.ahead, self.ahead_changed = (images, 0), False

    def clear(self) -> None:
        with self.expecting("clear", works=True):
            self.kd.clear()
            self.forget()

    def change_images(self) -> None:
        """In place, as augmentation on the device does."""
        index = self.draw.randrange(len(SIZES))
        self.log.append(f"change images {index}")
        images = self.images[index]
        images.add_(0.01)
        for seen in self.forwards:
            seen.images_changed = seen.images_changed or seen.images is images
        if self.ahead is not None and self.ahead[0] is images:
            self.ahead_changed = True

    def change_logits(self) -> None:
        if self.last is not None and self.last.open and self.last.logits.requires_grad:
            self.log.append("change logits")
            self.last.logits.div_(2)
            self.last.logits_changed = True

    def train_or_eval(self) -> None:
        self.log.append("train or eval")
        self.student.train(self.draw.random() < 0.8)

    def teacher_mode(self) -> None:
        self.log.append("teacher mode")
        self.teacher.train(self.draw.random() < 0.5)

    def save(self) -> None:
        if self.attached and self.fitted:
            self.log.append("save")
            self.saved = (copy.deepcopy(self.kd.state_dict()), self.step)

    def load(self) -> None:
        if self.saved is None:
            return
        with self.expecting("load", works=self.attached):
            self.kd.load_state_dict(self.saved[0])
            self.step, self.fitted = self.saved[1], True

    def go_on_with_a_copy(self) -> None:
        if self.kd is None:
            return
        with self.expecting("deepcopy", works=True):
            self.student, self.kd = copy.deepcopy((self.student, self.kd))
            self.forget()

    def detach(self) -> None:
        with self.expecting("detach", works=True):
            self.kd.detach()
            self.attached = False
            self.forget()

    def remove(self) -> None:
        with self.expecting("remove", works=True):
            self.kd.remove()
            self.layers = self.attached = False
            self.forget()

    # ------------------------------------------------------------ the model

    def forget(self) -> None:
        self.forwards.clear()
        self.last = self.ahead = None

    def compare(self, found: Tensor, seen: Seen) -> None:
        """The sum of the terms, and its gradient, by hand."""
        expected = self.by_hand(seen)
        same = torch.allclose(found, expected, rtol=1e-4, atol=1e-6)
        weight = self.student.stem[0].weight
        ours, theirs = (
            torch.autograd.grad(value, weight, retain_graph=True)[0] for value in (found, expected)
        )
        # Distances in float32 round: single small entries may differ more than the whole.
        if not same or (ours - theirs).norm() > 1e-3 * theirs.norm():
            self.wrong(f"loss {found.item()} instead of {expected.item()}")

    def by_hand(self, seen: Seen) -> Tensor:
        twin = copy.deepcopy(self.teacher).eval()
        with torch.no_grad():
            first = twin.first(twin.stem(seen.images))
            last = twin.last(first)
            logits = twin.head(last.mean((2, 3)))
        terms = {term.name: term.loss for term in self.kd._terms}
        ours, theirs = F.log_softmax(seen.kept / 4, 1), F.softmax(logits / 4, 1)
        kd = 16 * F.kl_div(ours, theirs, reduction="batchmean")
        regressor = terms["FitNetLoss.first"].regressor
        hint = (F.conv2d(seen.first, regressor.weight, regressor.bias) - first).square().mean()
        head = self.student.last[-1].kd.head
        cosines = F.normalize(rows_of(seen.last), dim=1) @ F.normalize(head.weight, dim=1).T
        centers = terms["TemplateLoss.last"].template_targets.centers
        assigned = (-(torch.cdist(rows_of(last), centers) ** 2)).softmax(1)
        scores = F.log_softmax(head.scale * cosines, 1)
        template = F.kl_div(scores, assigned, reduction="batchmean")
        return template + 0.7 * kd + (1.0 + self.step) * hint

    def unharmed(self) -> None:
        """What no call may change: the teacher's mode and hooks, and the number of steps."""
        if any(module._forward_hooks for module in self.teacher.modules()):
            self.wrong("a hook stays in the teacher")
        if len({module.training for module in self.teacher.modules()}) > 1:
            self.wrong("the teacher's mode was changed")
        if self.attached and self.kd.step != self.step:
            self.wrong(f"step {self.kd.step} instead of {self.step}")

    @contextmanager
    def expecting(self, name: str, *, works: bool):
        """Count what a call does, and whether that is what it must do."""
        self.log.append(name)
        self.counts["calls"] += 1
        try:
            yield
        except KDLayersError as error:
            self.counts["refused"] += 1
            if works:
                self.wrong(f"{name} was refused: {error}")
        except Exception as error:  # anything but an error of ours is a fault, whatever it says
            self.counts["raw errors"] += 1
            self.log.append(f"{type(error).__name__}: {error}")
        else:
            if not works:
                self.wrong(f"{name} was not refused")

    def wrong(self, what: str) -> None:
        self.counts["silently wrong"] += 1
        self.log.append(f"WRONG: {what}")


CALLS = {
    "forward": 8,
    "loss": 8,
    "fit": 3,
    "train_or_eval": 2,
    "backward_without_the_loss": 2,
    "teach": 2,
    "change_images": 1,
    "change_logits": 1,
    "clear": 1,
    "forward_without_gradient": 1,
    "forward_that_fails": 1,
    "inside_batch": 1,
    "loss_under_no_grad": 1,
    "teacher_mode": 1,
    "save": 1,
    "load": 1,
    "go_on_with_a_copy": 1,
    "detach": 1,
    "remove": 1,
    "attach": 1,
}


def rows_of(maps: Tensor) -> Tensor:
    """``[B, C, H, W]`` to ``[B * H * W, C]``."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


def run(tries: int, seed: int) -> dict[str, int]:
    """Counts over ``tries`` sequences; the calls of a sequence that went wrong go to stderr."""
    counts: Counter[str] = Counter()
    for number in range(tries):
        sequence = Sequence(seed * 1_000_003 + number)
        sequence.run()
        counts += sequence.counts
        if sequence.counts["silently wrong"] or sequence.counts["raw errors"]:
            sys.stderr.write(f"sequence {number} of seed {seed}: {sequence.log}\n")
    names = ("calls", "refused", "silently wrong", "raw errors")
    return {"tried": tries} | {name: counts[name] for name in names}
