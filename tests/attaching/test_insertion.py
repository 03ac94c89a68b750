"""Where a KD layer may not go, and the precision it gets."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kdlayers import CodebookTargets, KDLoss, KDPoint, attach_kd, bake
from kdlayers.errors import AttachError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class DefaultAct(nn.Module):
    """Ends its stage with the module of a default argument, which all instances share."""

    def __init__(self, act=nn.ReLU()):  # noqa: B008
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), act)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.stage(x).mean((2, 3)))


def test_a_module_that_the_teacher_has_too_gets_no_layer():
    student, teacher = DefaultAct(), DefaultAct().eval()
    keys, expected = list(student.state_dict()), teacher(IMAGES)
    point = KDPoint("stage", targets=CodebookTargets(4))
    with pytest.raises(AttachError, match=r"belongs to the teacher too.*copy\.deepcopy\(teacher\)"):
        attach_kd(student, teacher, [point], example=IMAGES)
    assert list(student.state_dict()) == keys
    assert torch.equal(teacher(IMAGES), expected)
    kd = attach_kd(student, copy.deepcopy(teacher), [point], losses=[KDLoss()], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    student(IMAGES)
    kd.loss(LABELS).backward()
    assert kd.terms["TemplateLoss.stage"].isfinite()
    assert list(kd.layers) == ["stage"]


class CastsInside(Net):
    """Runs its trunk under an autocast of its own, with parameters in float32."""

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.last(self.first(self.stem(x)))
        return self.head(x.float().mean((2, 3)))


@pytest.mark.parametrize("outside", [False, True])
def test_a_layer_has_the_precision_of_the_students_parameters(outside):
    student = Net(4) if outside else CastsInside(4)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        kd = attach_kd(student, at=[KDPoint("first", num_templates=8)], example=IMAGES)
    assert {p.dtype for p in kd.added_parameters()} == {torch.float32}
    before = kd.layers["first"].head.weight.clone()
    optimizer = torch.optim.SGD(student.parameters(), 1e-3)
    student(IMAGES).square().mean().backward()
    optimizer.step()
    assert (kd.layers["first"].value.weight.grad != 0).any()
    assert not torch.equal(kd.layers["first"].head.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_layer_follows_a_student_in_another_precision(dtype):
    kd = attach_kd(Net(4).to(dtype), at=[KDPoint("first", num_templates=8)], example=IMAGES)
    assert {p.dtype for p in kd.added_parameters()} == {dtype}


class ConvNorm(nn.Module):
    """A convolution without bias, then a batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("how", ["fuse_conv_bn_eval", "fuse_modules"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fusing_a_point_with_its_batch_norm_is_an_error(how):
    student = ConvNorm().train()
    kd = attach_kd(student, at=[KDPoint("conv", num_templates=8)], example=IMAGES)
    student(IMAGES)
    kd.detach()
    student.eval()
    expected, baked = student(IMAGES), bake(student)
    if how == "fuse_modules":
        fused = torch.ao.quantization.fuse_modules(student, [["conv", "norm"]])
    else:
        fused = copy.deepcopy(student)
        fused.conv, fused.norm = fuse_conv_bn_eval(fused.conv, fused.norm), nn.Identity()
    with pytest.raises(AttachError, match=r"'conv' has been fused with a batch norm.*bake"):
        fused(IMAGES)
    assert torch.equal(student(IMAGES), expected)
    assert torch.equal(baked(IMAGES), expected)
