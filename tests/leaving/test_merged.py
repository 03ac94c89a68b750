"""Students whose branches and batch norms are merged for inference, as timm does for RepVGG."""

import pytest
import torch
from timm import create_model
from timm.utils.model import reparameterize_model
from torch import nn

from kdlayers import KDPoint, attach_kd, bake, fold

IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CONVERT = {"bake": bake, "fold": fold}


def trained(name, at, **options):
    """A student with statistics of its own, so that merging changes the convolutions."""
    torch.manual_seed(0)
    student = create_model(name, num_classes=3, **options)
    attach_kd(student, at=[KDPoint(at, num_templates=8)], example=IMAGES).detach()
    student.train()(IMAGES)
    return student.eval()


@pytest.mark.parametrize("how", CONVERT)
@pytest.mark.parametrize(
    ("name", "at", "options"),
    [
        ("repvgg_a0", "stages.1", {}),
        # timm replaces these modules, a convolution and its batch norm, by a convolution.
        ("efficientvit_m0", "patch_embed.conv2", {"img_size": 64}),
        ("levit_128s", "stem.conv2", {"img_size": 64}),
    ],
)
@torch.no_grad()
def test_layers_stay_when_timm_merges_branches_and_batch_norms(name, at, options, how):
    student = CONVERT[how](trained(name, at, **options))
    merged = reparameterize_model(student)

    def norms(model):
        return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())

    assert norms(merged) < norms(student) / 2
    torch.testing.assert_close(merged(IMAGES), student(IMAGES), rtol=1e-4, atol=1e-4)


def test_a_layer_inside_what_is_merged_raises():
    student = trained("mobileone_s0", "stages.1.0.conv_kxk.0")
    with pytest.raises(AssertionError):  # of timm
        reparameterize_model(bake(student))
