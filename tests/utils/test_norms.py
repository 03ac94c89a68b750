"""Safe norms: zero vectors map to zero and get no gradient."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from kdlayers import AttentionTransferLoss, InheritExploreLoss
from kdlayers._utils.norms import inverse, inverse_norm
from kdlayers.functional import exploration, inheritance


def vectors_of_all_lengths():
    torch.manual_seed(0)
    lengths = torch.logspace(-20, 20, 200, dtype=torch.float64)
    vectors = F.normalize(torch.randn(200, 7, dtype=torch.float64)) * lengths[:, None]
    vectors[::50] = 0
    return vectors


def test_unit_vectors_equal_those_of_torch():
    vectors = vectors_of_all_lengths()
    wanted = F.normalize(vectors, dim=-1, eps=1e-12)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            found = vectors * inverse_norm(vectors)
        torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0)
    norms = vectors.norm(dim=-1)
    torch.testing.assert_close(vectors * inverse(norms)[:, None], wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_vectors_get_zero_gradients(dtype):
    vectors = torch.zeros(3, 4, dtype=dtype)
    vectors[1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    vectors.requires_grad_()
    (vectors * inverse_norm(vectors)).sum().backward()
    assert torch.equal(vectors.grad[::2], torch.zeros(2, 4, dtype=dtype))
    # The projection that takes the part along u = (0.6, 0.8, 0, 0) off, over the length 5.
    wanted = (torch.ones(4) - 1.4 * torch.tensor([0.6, 0.8, 0.0, 0.0])) / 5
    torch.testing.assert_close(vectors.grad[1], wanted.to(dtype))


def numbers_of(call):
    student, teacher = torch.zeros(4, 6, 3, 3), torch.randn(4, 6, 3, 3)
    student[0] = torch.randn(6, 3, 3)
    student.requires_grad_()
    value = call(student, teacher)
    value.backward()
    return value, student.grad


@pytest.mark.parametrize(
    "call",
    [
        AttentionTransferLoss(),
        InheritExploreLoss(host="attention"),
        *(
            partial(function, measure=measure)
            for function in (inheritance, exploration)
            for measure in ("norm", "cosine", "cka")
        ),
    ],
    ids=lambda call: (
        f"{call.func.__name__}, {call.keywords['measure']}"
        if isinstance(call, partial)
        else type(call).__name__
    ),
)
def test_dead_features_do_not_explode(call):
    value, grad = numbers_of(call)
    assert value.isfinite()
    assert grad.abs().max() < 100
    assert not grad[1:].any() or getattr(call, "keywords", {}).get("measure") == "cka"


def test_a_dead_half_of_the_channels_does_not_explode():
    torch.manual_seed(0)
    teacher = torch.randn(4, 8, 3, 3)
    student = torch.randn(4, 8, 3, 3).relu()
    student[:, :4] = 0
    student.requires_grad_()
    loss = InheritExploreLoss(factor_channels=4, epochs=1)
    loss.build(student, teacher)
    loss.fit([(teacher, None)])
    loss(student, teacher).backward()
    for tensor in (student, *loss.parameters()):
        assert tensor.grad.abs().max() < 1e3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_half_precision_vectors_are_float32(dtype):
    vectors = torch.full((2, 300), 300.0, dtype=dtype)  # the squares overflow in float16
    found = inverse_norm(vectors)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2, 1), 1 / (300 * 300**0.5)), rtol=1e-6, atol=0)
