"""The warning of an optimiser that lacks parameters of the KD layers or of the losses."""

import warnings

import pytest
import torch

from kdlayers import CodebookTargets, DistillLoss, KDPoint, attach_kd
from kdlayers.errors import KDLayersWarning
from tests.nets import Net
from tests.step.test_handle import IMAGES, LABELS, attached, step


def test_optimiser_made_before_attach_is_noticed():
    student, teacher = Net(4), Net(6)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    kd = attach_kd(student, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    step(student, kd, optimiser)
    with pytest.warns(KDLayersWarning, match=r"not TemplateLoss.last.* after attach_kd"):
        step(student, kd, optimiser)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(student, kd, optimiser)


@pytest.mark.parametrize("unused", ["first", "last"])
def test_an_optimiser_is_noticed_beside_parameters_that_no_forward_uses(unused):
    class Partly(torch.nn.Module):
        def __init__(self):
            super().__init__()
            nets = {"net": Net(4), "unused": torch.nn.Linear(2, 2)}
            for name in sorted(nets, reverse=unused == "first"):
                setattr(self, name, nets[name])

        def forward(self, images):
            return self.net(images)

    student = Partly().train()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    points = [KDPoint("net.last", "last", targets=CodebookTargets(4))]
    kd = attach_kd(student, Net(6), points, example=IMAGES)
    kd.fit([(IMAGES, LABELS)])
    step(student, kd, optimiser)
    with pytest.warns(KDLayersWarning, match=r"not TemplateLoss.net.last"):
        step(student, kd, optimiser)


@pytest.mark.parametrize("held", [True, False])
def test_in_half_precision_one_changed_template_shows_the_optimiser(held):
    student, images = Net(4).bfloat16(), IMAGES.bfloat16()
    points = [KDPoint("last", targets=CodebookTargets(64))]
    kd = attach_kd(student, Net(6).bfloat16(), points, example=images)
    kd.fit([(images, LABELS)])
    templates = kd.layers["last"].head.weight
    own = [values for values in student.parameters() if values is not templates]
    student(images), kd.loss(LABELS)
    with torch.no_grad():  # a step so small that rounding leaves all templates but one as they were
        for values in [*own, templates[-1, -1:]] if held else own:
            values += 0.25
    student(images)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kd.loss(LABELS)
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == (0 if held else 1)
    assert all("or its steps are below the precision of torch.bfloat16" in m for m in messages)


class Projected(DistillLoss):
    """A loss with a parameter of its own."""

    def build(self, student, teacher):
        self.scale = torch.nn.Parameter(torch.ones(student.shape[1]))

    def forward(self, student, teacher, targets=None):
        return (student * self.scale - teacher).square().mean()


def test_train_only_parameters_are_the_handles_and_missing_ones_are_noticed():
    student, teacher, kd = attached(losses=[Projected()])
    (parameter,) = kd.parameters()
    assert parameter.shape == (3,)
    assert all(parameter is not p for p in student.parameters())
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    step(student, kd, optimiser)
    with pytest.warns(KDLayersWarning, match=r"not Projected.*kd\.parameters\(\)"):
        step(student, kd, optimiser)
    assert parameter.grad is not None
