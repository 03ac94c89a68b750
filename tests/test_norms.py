"""The lengths that cosines divide by."""

import pytest
import torch
from torch.nn import functional as F

from kdlayers._utils.norms import inverse, inverse_norm, safe_norm


def vectors_of_all_lengths():
    torch.manual_seed(0)
    lengths = torch.logspace(-20, 20, 200, dtype=torch.float64)
    vectors = F.normalize(torch.randn(200, 7, dtype=torch.float64)) * lengths[:, None]
    vectors[::50] = 0
    return vectors


def test_units_are_those_of_torch():
    vectors = vectors_of_all_lengths()
    wanted = F.normalize(vectors, dim=-1, eps=1e-12)
    for found in (vectors * inverse_norm(vectors), vectors / safe_norm(vectors)):
        torch.testing.assert_close(found, wanted, rtol=1e-15, atol=0)
    norms = vectors.norm(dim=-1)
    torch.testing.assert_close(vectors * inverse(norms)[:, None], wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zeros_pass_no_gradient_on(dtype):
    vectors = torch.zeros(3, 4, dtype=dtype)
    vectors[1] = torch.tensor([3.0, 4.0, 0.0, 0.0])
    vectors.requires_grad_()
    (vectors * inverse_norm(vectors)).sum().backward()
    assert torch.equal(vectors.grad[::2], torch.zeros(2, 4, dtype=dtype))
    # The projection that takes the part along u = (0.6, 0.8, 0, 0) off, over the length 5.
    wanted = (torch.ones(4) - 1.4 * torch.tensor([0.6, 0.8, 0.0, 0.0])) / 5
    torch.testing.assert_close(vectors.grad[1], wanted.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lengths_of_half_precision_are_float32(dtype):
    vectors = torch.full((2, 300), 300.0, dtype=dtype)  # the squares overflow in float16
    found = inverse_norm(vectors)
    assert found.dtype == safe_norm(vectors).dtype == torch.float32
    torch.testing.assert_close(found, torch.full((2, 1), 1 / (300 * 300**0.5)), rtol=1e-6, atol=0)
