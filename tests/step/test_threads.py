"""One teacher, several students, each in a thread of its own."""

import threading
import time

import torch

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd
from tests.attach_tester import Frozen
from tests.nets import Net, batch, losses_of_steps

IMAGES, LABELS = batch()


class Slow(Net):
    """Lets other threads run in the middle of its forward."""

    def forward(self, x):
        x = self.first(self.stem(x))
        time.sleep(0.002)
        x = self.last(x)
        time.sleep(0.002)
        return self.head(x.mean((2, 3)))


def attached(teacher, kind):
    """Students that read different parts of the teacher: features alone, and logits too."""
    torch.manual_seed(kind)
    student = Net(4).train()
    if kind == 0:
        kd = attach_kd(student, teacher, losses=[FitNetLoss(at="first")], example=IMAGES)
    else:
        point = KDPoint("last", targets=CodebookTargets(num_templates=4))
        kd = attach_kd(student, teacher, [point], losses=[KDLoss()], example=IMAGES)
        kd.fit([(IMAGES, LABELS)], progress=False)
    return student, kd


def losses(student, kd, steps=8):
    return losses_of_steps(student, kd, IMAGES, LABELS, steps)


def test_losses_in_threads_equal_those_without_threads():
    teacher = Slow(6).train()  # kd.loss runs it in eval mode and puts the mode back
    teacher.last.eval()
    frozen = Frozen(teacher)
    expected = [losses(*attached(teacher, kind)) for kind in (0, 1)]
    pairs = [attached(teacher, kind) for kind in (0, 1)]
    found, errors = [None, None], []

    def run(index):
        try:
            found[index] = losses(*pairs[index])
        except BaseException as error:  # shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert found == expected
    assert frozen.unchanged(teacher)
    assert not any(module._forward_hooks for module in teacher.modules())
