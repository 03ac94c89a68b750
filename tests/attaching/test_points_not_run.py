"""find_points names the stages and blocks that a forward does not run, with the reason."""

import torch
from torch import Tensor, nn
from torchvision import models

from kdlayers import find_points

IMAGES = torch.zeros(2, 3, 64, 64)
NOT_RUN = "it did not run, or its output is not a floating-point tensor"


def block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())


class Features(nn.Sequential):
    """Is called by a method of its own, so no hook runs."""

    def features(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = block(), block()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Unusual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ModuleList([block(), block()])
        self.named = nn.ModuleDict({"one": block()})
        self.never = Pair()
        self.method = Features(*block())
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        for module in self.listed:
            x = module(x)
        return self.head(self.method.features(self.named["one"](x)).mean((2, 3)))


def test_modules_that_do_not_run_are_named_but_their_lists_and_parts_are_not():
    found = find_points(Unusual(), IMAGES)
    assert [point.name for point in found] == ["listed.0", "listed.1", "named.one", "method"]
    assert found.left_out == {"never": NOT_RUN}
    assert repr(found).splitlines()[-1] == f"not listed, never: {NOT_RUN}"


def test_auxiliary_heads_do_not_run_in_eval_mode():
    model = models.googlenet(init_weights=False)
    assert find_points(model, IMAGES).left_out == dict.fromkeys(("aux1", "aux2"), NOT_RUN)


def test_a_graph_has_no_blocks_to_attach_to():
    model = models.resnet18()
    exported = torch.export.export(model, (IMAGES,)).module()
    for graph in (torch.fx.symbolic_trace(model), exported):
        found = find_points(graph, IMAGES)
        assert found == []
        said = "not listed, layer1, ..., layer4: a traced or exported graph does not run the blocks"
        assert said in repr(found)


def test_nothing_is_left_out_of_a_usual_model():
    assert find_points(models.resnet18(), IMAGES).left_out == {}
