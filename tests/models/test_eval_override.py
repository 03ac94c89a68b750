"""Dry runs of models that do more than set a flag when their mode changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import KDLoss, KDPoint, attach_kd, find_points, prune_templates
from kdlayers._models.undisturbed import undisturbed
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class LowRank(nn.Linear):
    """Merges its low-rank part into its weight in eval mode, and takes it out in train mode."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (-1 if mode else 1) * self.b @ self.a
            self.merged = not mode
        return self

    def forward(self, x):
        output = super().forward(x)
        return output if self.merged else output + F.linear(F.linear(x, self.a), self.b)


def low_rank(channels=4):
    torch.manual_seed(channels)
    model = Net(channels)
    model.head = LowRank(channels + 1, 3)
    return model


def check(model, run):
    """Check that ``run`` changes neither the weights nor what the model returns in eval mode."""
    before, wanted = copy.deepcopy(model.state_dict()), copy.deepcopy(model).eval()(IMAGES)
    run()
    assert all(module.training for module in model.modules())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(model.eval()(IMAGES), wanted)


def test_find_points_leaves_merged_weights_alone():
    model = low_rank()
    check(model, lambda: find_points(model, IMAGES))


def test_attaching_and_losses_leave_merged_weights_alone():
    student, teacher = low_rank(), low_rank(6)

    def run():
        kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
        with torch.no_grad():
            wanted = KDLoss()(student(IMAGES), copy.deepcopy(teacher).eval()(IMAGES), LABELS)
        student.load_state_dict(saved)  # the step has updated the running statistics
        student(IMAGES)
        torch.testing.assert_close(kd.loss(LABELS), wanted)
        kd.remove()
        student.load_state_dict(saved)

    saved = copy.deepcopy(student.state_dict())
    check(teacher, lambda: check(student, run))


def test_pruning_leaves_merged_weights_alone():
    student = low_rank()
    attach_kd(student, at=[KDPoint("last", num_templates=4)], example=IMAGES).detach()
    weights = copy.deepcopy(student.head.state_dict())
    prune_templates(student, [IMAGES])
    torch.testing.assert_close(student.head.state_dict(), weights, rtol=0, atol=0)


class Caching(Net):
    """Keeps what it computes from a weight in eval mode until its mode is set again."""

    def __init__(self):
        super().__init__(4)
        self.bias = nn.Parameter(torch.zeros(3))
        self.cache, self.sizes = {"old": 1}, [1]

    def train(self, mode=True):
        self.cache = {}
        return super().train(mode)

    def forward(self, x):
        self.sizes.append(len(x))
        bias = self.bias * 2 if self.training else self.cache.setdefault("bias", self.bias * 2)
        return super().forward(x) + bias


def test_a_cache_that_a_dry_run_fills_is_emptied():
    """Or a later dry run, in which no train() empties it, would use it with other weights."""
    model = Caching().train()
    cache, sizes = model.cache, model.sizes
    for value in (0.0, 1.0):
        with torch.no_grad():
            model.bias.fill_(value)
            wanted = copy.deepcopy(model).eval()(IMAGES)
        with undisturbed(model):
            torch.testing.assert_close(model(IMAGES), wanted)
    assert model.cache is cache
    assert model.sizes is sizes
    assert cache == {}
    assert sizes == [1]


@pytest.mark.parametrize("change", [dict.clear, lambda cache: cache.update(old=2, more=3)])
def test_a_dict_gets_its_items_back(change):
    model = Caching()
    with undisturbed(model):
        change(model.cache)
    assert list(model.cache.items()) == [("old", 1)]
