"""Weights whose integers stay while their scales move."""

from dataclasses import replace

import pytest
import torch

from qmoe.config import Scheme
from qmoe.format.grid import dequantize
from qmoe.layer.fixed import FixedIntegers, fixed_matrices, scales_of
from qmoe.solvers.rtn import rtn


def test_the_gradient_of_scales_is_the_sum_over_their_group():
    q = torch.tensor([[-2, 1, 0, 1]], dtype=torch.int8)
    scale = torch.tensor([[0.5, 2.0]], requires_grad=True)
    zero = torch.tensor([[1, 0]], dtype=torch.int8)
    weight = FixedIntegers.apply(q, scale, zero)
    assert torch.equal(weight, torch.tensor([[-1.5, 0.0, 0.0, 2.0]]))
    weight.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert torch.equal(scale.grad, torch.tensor([[-3.0, 1000.0]]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rotation", [0, 32])
def test_factors_of_one_change_nothing(symmetric, rotation):
    scheme = Scheme(3, 32, symmetric, rotation)
    stack = rtn(torch.randn(3, 5, 64), scheme, torch.bfloat16)
    factors = torch.ones_like(stack.scale, dtype=torch.float32)
    made = torch.stack([m.weight() for m in fixed_matrices(stack, factors, torch.device("cpu"))])
    assert torch.equal(made, dequantize(stack))


def test_scales_have_the_values_that_are_stored_and_a_gradient():
    stack = rtn(torch.randn(2, 4, 64), Scheme(2, 32), torch.bfloat16)
    factors = torch.full_like(stack.scale, 1.003, dtype=torch.float32).requires_grad_()
    scales = scales_of(stack, factors)
    assert torch.equal(scales, scales.to(torch.bfloat16).float())
    scales.sum().backward()
    assert torch.equal(factors.grad, stack.scale.float())
    moved = replace(stack, scale=scales.detach().to(torch.bfloat16))
    weights = [m.weight() for m in fixed_matrices(stack, factors, torch.device("cpu"))]
    assert torch.equal(torch.stack(weights).detach(), dequantize(moved))
