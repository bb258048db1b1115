"""The kernels as torch custom ops, so that torch.compile keeps a packed model in one graph.

An op takes tensors and numbers only: an arena travels as its two buffers and a list of integers
(`describe`). Each op has a fake that gives its output's shape and dtype.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from qmoe.kernels import layer
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena import Arena, Matrix
from qmoe.kernels.layout import ORDERS

FIELDS = 7  # integers of a Matrix


def describe(arena: Arena) -> list[int]:
    """An arena without its buffers."""
    numbers = [ORDERS.index(arena.order)]
    for m in arena.matrices:
        numbers += [m.n, m.k, m.rows, m.bits, m.group, int(m.zero), int(m.paired)]
    return numbers


def _arena(buffer: Tensor, table: Tensor, numbers: Sequence[int], dtype: torch.dtype) -> Arena:
    matrices = []
    for at in range(1, len(numbers), FIELDS):
        n, k, rows, bits, group, zero, paired = numbers[at : at + FIELDS]
        matrices.append(Matrix(n, k, rows, bits, group, bool(zero), bool(paired)))
    return Arena(tuple(matrices), buffer, table, ORDERS[numbers[0]], dtype)


def launched_on(x: Tensor) -> AbstractContextManager[object]:
    """Makes the GPU of a tensor the current one, on which Triton starts kernels."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@torch.library.custom_op("qmoe::routed_experts", mutates_args=())
def routed_experts(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    buffer: Tensor,
    table: Tensor,
    arena: Sequence[int],
    activation: str,
    alpha: float,
    limit: float,
    first_bias: Tensor | None,
    second_bias: Tensor | None,
) -> Tensor:
    """experts.routed_experts."""
    packed = _arena(buffer, table, arena, x.dtype)
    between = Activation(activation, alpha, limit)
    with launched_on(x):
        return layer.routed_experts(x, ids, gates, packed, between, first_bias, second_bias)


@routed_experts.register_fake
def _(x, ids, gates, buffer, table, arena, activation, alpha, limit, first_bias, second_bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], arena[1 + FIELDS])


@torch.library.custom_op("qmoe::first_product", mutates_args=())
def first_product(
    x: Tensor,
    ids: Tensor,
    buffer: Tensor,
    table: Tensor,
    arena: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """experts.first_product without an activation: for those that are not fused."""
    with launched_on(x):
        return layer.first_product(x, ids, _arena(buffer, table, arena, x.dtype), bias=bias)


@first_product.register_fake
def _(x, ids, buffer, table, arena, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(ids.numel(), arena[1])


@torch.library.custom_op("qmoe::second_product", mutates_args=())
def second_product(
    mid: Tensor,
    ids: Tensor,
    gates: Tensor,
    buffer: Tensor,
    table: Tensor,
    arena: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """experts.second_product."""
    packed = _arena(buffer, table, arena, mid.dtype)
    with launched_on(mid):
        return layer.second_product(mid, ids, gates, packed, bias)


@second_product.register_fake
def _(mid, ids, gates, buffer, table, arena, bias):  # type: ignore[no-untyped-def]
    return mid.new_empty(ids.shape[0], arena[1 + FIELDS])


@torch.library.custom_op("qmoe::linear", mutates_args=())
def linear(
    x: Tensor, buffer: Tensor, table: Tensor, arena: Sequence[int], bias: Tensor | None
) -> Tensor:
    """experts.linear."""
    with launched_on(x):
        return layer.linear(x, _arena(buffer, table, arena, x.dtype), bias)


@linear.register_fake
def _(x, buffer, table, arena, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], arena[1])
