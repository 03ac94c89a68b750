"""Blocks that are compiled one by one and checkpointed."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd
from tests.nets import Net, batch

IMAGES, LABELS = batch()

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


class Checkpointed(Net):
    def forward(self, x):
        for block in (self.stem, self.first, self.last):
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean((2, 3)))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("losses", [0, 1])
def test_a_checkpointed_block_with_a_layer_may_be_compiled(losses):
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        student, more = Checkpointed(4).train(), [KDLoss(), FitNetLoss(at="first")][: 1 + losses]
        points = [KDPoint("last", targets=CodebookTargets(4))]
        kd = attach_kd(student, Net(6).eval(), points, losses=more, example=IMAGES)
        kd.fit([(IMAGES, LABELS)], progress=False)
        if compiled:
            for block in (student.first, student.last):
                block.compile()
        for _ in range(2):
            student.zero_grad()
            (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
        found.append([p.grad for p in student.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


# Under strict export torch reports that the hooks note whether a forward is recorded.
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_an_export_leaves_nothing_in_the_handle(strict, training):
    if strict and torch.__version__ < TorchVersion("2.10"):
        pytest.skip("strict export of torch 2.9 does not trace these hooks")
    student = Net(4)
    points = [KDPoint("last", targets=CodebookTargets(4))]
    kd = attach_kd(student, Net(6).eval(), points, example=IMAGES)
    torch.export.export(student.train(training), (IMAGES,), strict=strict)
    assert kd._tape.forward is None
    assert kd._tape.spare is None
