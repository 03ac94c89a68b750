"""LoRA of the peft library around a student with KD layers."""

import warnings

import pytest
import torch

from kdlayers import CodebookTargets, KDPoint, attach_kd
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch

peft = pytest.importorskip("peft")
IMAGES, LABELS = batch()


def attached():
    torch.manual_seed(0)
    student, teacher = Net(4), Net(6)
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(8))])
    kd.fit([(IMAGES, LABELS)], progress=False)
    return student, kd


def gradients(model, kd):
    loss = model(IMAGES).square().mean() + kd.loss(LABELS)
    loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and ".kd." in name:
            found[name.rpartition(".kd.")[2].replace("modules_to_save.default.", "")] = parameter
    return {name: parameter.grad for name, parameter in found.items()}


def test_frozen_kd_layers_are_named():
    student, kd = attached()
    model = peft.get_peft_model(student, peft.LoraConfig(target_modules=["first.1"])).train()
    with pytest.warns(KDLayersWarning, match=r'pass modules_to_save=\["kd"\] to peft'):
        gradients(model, kd)


def test_kd_layers_among_the_modules_to_save_learn_as_without_peft():
    student, kd = attached()
    expected = gradients(student.train(), kd)
    student, kd = attached()
    config = peft.LoraConfig(target_modules=["first.1"], modules_to_save=["kd"])
    model = peft.get_peft_model(student, config).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(model, kd)  # a new LoRA adds zero
    assert found.keys() == expected.keys()
    assert len(found) == 6
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
