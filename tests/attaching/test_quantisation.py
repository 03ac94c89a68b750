"""Distillation of students in quantisation-aware training, in graphs of torch.fx."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.ao.quantization import get_default_qat_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

IMAGES, LABELS = batch(8)


def prepared(model):
    return prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (IMAGES,))


def train(student, kd, steps=10):
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)).backward()
        optimizer.step()


def test_kd_layers_are_trained_before_and_losses_during_quantisation():
    student, teacher = Net(4), Net(6).eval()
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    train(student, kd)
    kd.detach()
    graph = prepared(student)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KDLayersWarning)
        losses = [KDLoss(temperature=2.0), FitNetLoss(at=("last.0", "last"))]
        kd = attach_kd(graph, teacher, losses=losses, example=IMAGES)
    logits = graph(IMAGES)
    kd.loss(LABELS)
    ours, theirs = (z.detach().div(2).log_softmax(1) for z in (logits, teacher(IMAGES)))
    expected = 4 * (theirs.exp() * (theirs - ours)).sum(1).mean()
    torch.testing.assert_close(kd.terms["KDLoss"], expected)
    train(graph, kd)
    kd.detach()
    found = graph.eval()(IMAGES)
    quantised = convert_fx(copy.deepcopy(graph))
    assert any("kd" in name for name, _ in quantised.named_modules())
    near = (quantised(IMAGES) - found).abs().max()
    assert near < 0.1 * found.std()


def test_kd_layers_in_a_prepared_graph_give_a_warning_because_they_are_lost():
    graph, teacher = prepared(Net(4)), Net(6).eval()
    points = [KDPoint("last.0", "last", targets=CodebookTargets(4))]
    with pytest.warns(KDLayersWarning, match=r"would lose the KD layers at \['last.0'\]"):
        kd = attach_kd(graph, teacher, points, example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    train(graph, kd)
    kd.detach()
    assert any(name.endswith("kd") for name, _ in graph.named_modules())
    quantised = convert_fx(copy.deepcopy(graph.eval()))
    assert not any("kd" in name for name, _ in quantised.named_modules())
