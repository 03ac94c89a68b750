"""Students under vmap and in forward-mode derivatives, where no path may write into a part."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, stack_module_state, vmap

from kdlayers import KDLayer, KDPoint, attach_kd, bake, fold
from tests.nets import Net, batch

IMAGES, _ = batch(4)
MAKE = {"student": lambda s: s, "bake": bake, "fold": fold}


def trained():
    student = Net(4)
    attach_kd(student, at=[KDPoint("last", num_templates=8)], example=IMAGES).detach()
    student.train()(IMAGES)
    return student.eval()


@pytest.mark.parametrize("made", MAKE)
@pytest.mark.parametrize("grad", [True, False])
def test_an_ensemble_under_vmap(made, grad):
    models = [MAKE[made](trained()) for _ in range(2)]
    with torch.set_grad_enabled(grad):
        expected = torch.stack([model(IMAGES) for model in models])
        state = stack_module_state(models)
        found = vmap(lambda *state: functional_call(models[0], state, (IMAGES,)))(*state)
        torch.testing.assert_close(found, expected)
        each = vmap(lambda image: models[0](image[None])[0])(IMAGES)
        torch.testing.assert_close(each, expected[0])


@torch.no_grad()
def test_vmap_over_one_parameter_or_buffer():
    layer = KDLayer(5, 7).eval()
    x = torch.randn(2, 5, 3, 3)
    for name in ("head.weight", "value.weight", "norm.running_mean"):
        tensor = layer.get_parameter(name) if "weight" in name else layer.get_buffer(name)
        several = torch.stack([tensor, tensor + 1])
        found = vmap(lambda part, name=name: functional_call(layer, {name: part}, (x,)))(several)
        expected = [functional_call(layer, {name: part}, (x,)) for part in several]
        torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("made", ["layer", *MAKE])
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's forward mode
def test_forward_mode_derivatives_without_gradients(made):
    model = KDLayer(3, 7).eval() if made == "layer" else MAKE[made](trained())
    x = IMAGES.clone()
    x[0, :, 0, 0] = 0  # features without a direction, which get no derivative
    tangent = torch.randn_like(x)
    _, expected = torch.func.jvp(model, (x,), (tangent,))
    with torch.no_grad():
        _, found = torch.func.jvp(model, (x,), (tangent,))
        torch.testing.assert_close(found, expected)
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent
        torch.testing.assert_close(found, expected)
