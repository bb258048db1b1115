"""The kernels for EXL3's codes as torch custom ops, as kernels/ops.py has those for integers: an
arena travels as its two buffers and a list of integers (`describe`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmoe.format.exl3 import CODEBOOKS
from qmoe.kernels.activation import Activation
from qmoe.kernels.coded import layer
from qmoe.kernels.coded.arena import CodedArena, CodedMatrix
from qmoe.kernels.ops import launched_on

FIELDS = 4  # integers of a matrix


def describe(arena: CodedArena) -> list[int]:
    """An arena without its buffers."""
    numbers = [arena.first]
    for m in arena.matrices:
        numbers += [m.n, m.k, m.rates, CODEBOOKS.index(m.codebook)]
    return numbers


def _arena(buffer: Tensor, table: Tensor, numbers: Sequence[int], dtype: torch.dtype) -> CodedArena:
    matrices = []
    for at in range(1, len(numbers), FIELDS):
        n, k, rates, codebook = numbers[at : at + FIELDS]
        matrices.append(CodedMatrix(n, k, rates, CODEBOOKS[codebook]))
    return CodedArena(tuple(matrices), numbers[0], buffer, table, dtype)


@torch.library.custom_op("qmoe::coded_experts", mutates_args=())
def coded_experts(
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
    """layer.routed_experts."""
    coded, between = _arena(buffer, table, arena, x.dtype), Activation(activation, alpha, limit)
    with launched_on(x):
        return layer.routed_experts(x, ids, gates, coded, between, first_bias, second_bias)


@coded_experts.register_fake
def _(x, ids, gates, buffer, table, arena, activation, alpha, limit, first_bias, second_bias):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], arena[-FIELDS])


@torch.library.custom_op("qmoe::coded_first", mutates_args=())
def coded_first(
    x: Tensor, ids: Tensor, buffer: Tensor, table: Tensor, arena: Sequence[int], bias: Tensor | None
) -> Tensor:
    """layer.first_product."""
    with launched_on(x):
        return layer.first_product(x, ids, _arena(buffer, table, arena, x.dtype), bias)


@coded_first.register_fake
def _(x, ids, buffer, table, arena, bias):  # type: ignore[no-untyped-def]
    return x.new_empty(ids.numel(), arena[0] * arena[1])


@torch.library.custom_op("qmoe::coded_second", mutates_args=())
def coded_second(
    mid: Tensor,
    ids: Tensor,
    gates: Tensor,
    buffer: Tensor,
    table: Tensor,
    arena: Sequence[int],
    bias: Tensor | None,
) -> Tensor:
    """layer.second_product."""
    with launched_on(mid):
        return layer.second_product(mid, ids, gates, _arena(buffer, table, arena, mid.dtype), bias)


@coded_second.register_fake
def _(mid, ids, gates, buffer, table, arena, bias):  # type: ignore[no-untyped-def]
    return mid.new_empty(ids.shape[0], arena[-FIELDS])


@torch.library.custom_op("qmoe::coded_linear", mutates_args=())
def coded_linear(x: Tensor, buffer: Tensor, table: Tensor, arena: Sequence[int]) -> Tensor:
    """layer.linear without a bias."""
    with launched_on(x):
        return layer.linear(x, _arena(buffer, table, arena, x.dtype))


@coded_linear.register_fake
def _(x, buffer, table, arena):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape[0], arena[1])
