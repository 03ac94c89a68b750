"""Graphs of torch.fx that were traced in training mode."""

import copy

import pytest
import torch
from torch import nn

from kdlayers import KDLayer, KDPoint, attach_kd, bake
from tests.nets import Net, batch

IMAGES, _ = batch(4)
MAKE = {"student": lambda s: s, "bake": bake}


def trained():
    student = Net(4)
    attach_kd(student, at=[KDPoint("last", num_templates=8)], example=IMAGES).detach()
    student.train()
    for _ in range(3):
        student(torch.randn(8, 3, 8, 8) + 1)
    return student


@pytest.mark.parametrize("made", MAKE)
def test_a_graph_follows_train_and_eval(made):
    model = MAKE[made](trained())
    graph = torch.fx.symbolic_trace(copy.deepcopy(model))
    for training in (True, False):  # the training forward updates the running statistics of both
        found, expected = (m.train(training)(IMAGES) for m in (graph, model))
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dict(graph.named_buffers()), dict(model.named_buffers()))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_a_graph_of_a_layer_alone(channel_dim):
    layer = KDLayer(5, 7, alpha=0.5, channel_dim=channel_dim)
    x = torch.randn(2, 5, 3, 5)
    graph = torch.fx.symbolic_trace(layer)
    for model in (layer, graph):
        model.train()(x)
    torch.testing.assert_close(graph.eval()(x), layer.eval()(x))
    kinds = [node.op for node in graph.graph.nodes]
    assert kinds.count("call_function") == 2  # which tools for quantisation leave in float
    assert kinds.count("call_module") == 1


def test_a_graph_calls_another_norm():
    student = trained()
    student.last[1].kd.norm = nn.Identity()
    torch.testing.assert_close(torch.fx.symbolic_trace(student)(IMAGES), student(IMAGES))


@pytest.mark.parametrize("made", MAKE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_an_image_has_one_output_after_quantisation_aware_training(made):
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

    model = MAKE[made](trained())
    mapping = get_default_qat_qconfig_mapping("x86")
    prepared = prepare_qat_fx(copy.deepcopy(model), mapping, (IMAGES,))
    for _ in range(3):
        prepared(torch.randn(8, 3, 8, 8) + 1)
    quantised = convert_fx(prepared.eval())
    assert any(type(module) is nn.BatchNorm1d for module in quantised.modules())
    together = quantised(IMAGES)
    alone = torch.cat([quantised(image) for image in IMAGES.split(1)])
    torch.testing.assert_close(alone, together)
