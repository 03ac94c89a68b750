"""The numbers of templates and classes that attach_kd infers for each point."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from kdlayers import CodebookTargets, DecisionTargets, KDPoint, attach_kd
from kdlayers.errors import ArgumentError
from tests.nets import Net


def test_without_a_teacher_the_targets_give_the_number_of_templates():
    student = Net()
    kd = attach_kd(student, at=[KDPoint("last", targets=CodebookTargets(8))])
    assert kd.layers["last"].head.weight.shape == (8, 5)
    with pytest.raises(ArgumentError, match=r"unknown; pass KDPoint\('first', num_templates=...\)"):
        attach_kd(Net(), at=["first"])
    with pytest.raises(ArgumentError, match="num_templates=4, but its targets have 8"):
        attach_kd(Net(), at=[KDPoint("last", targets=CodebookTargets(8), num_templates=4)])


def test_the_classes_are_the_students_where_the_teacher_knows_others():
    student, teacher = Net(classes=7), Net(classes=3)
    points = [
        KDPoint("first", targets=DecisionTargets(2, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    kd = attach_kd(student, teacher, at=points)
    assert kd.layers["first"].head.weight.shape[0] == 14
    images, labels = torch.randn(28, 3, 16, 16), torch.arange(28) % 7
    kd.fit(DataLoader(TensorDataset(images, labels), batch_size=14), progress=False)
    student(images[:7])
    loss = kd.loss(labels[:7])
    assert loss.isfinite()
    assert loss > 0


def test_number_of_templates_not_divisible_by_the_classes():
    with pytest.raises(ArgumentError, match="10 templates cannot be divided evenly among 7"):
        attach_kd(Net(classes=7), Net(classes=3), at=[KDPoint("first", num_templates=10), "last"])
