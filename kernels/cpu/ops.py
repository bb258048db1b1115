"""The CPU kernels as torch custom ops, so that torch.compile keeps a packed model in one graph.

A stack travels as its buffer, its table and six integers (layout.Shape.numbers). The functions that
end in _now are the same without torch's dispatcher, which takes longer than a small product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import CallStruct, StackStruct, run, run_side_by_side, tier

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "clamped_swiglu")
ABSENT = StackStruct()
PAIRED = 3  # place in a stack's integers


def stack_struct(
    buffer: Tensor, table: Tensor, numbers: Sequence[int], bias: Tensor | None = None
) -> StackStruct:
    """A stack as C takes it, valid as long as its tensors are."""
    return StackStruct(
        buffer.data_ptr(), table.data_ptr(), None if bias is None else bias.data_ptr(),
        table.shape[0], *numbers,
    )  # fmt: skip


def _run(
    x: Tensor,
    out: Tensor,
    ids: Tensor,
    gates: Tensor | None,
    shape: tuple[int, int],
    between: Activation | None,
    exact: bool,
    first: StackStruct,
    second: StackStruct,
) -> Tensor:
    """shape: tokens, choices."""
    number = tier()
    assert number is not None
    # These lines keep what the pointers point at alive until the call is over.
    ids_kept = ids.to(torch.int64).contiguous()
    gates_kept = None if gates is None else gates.float().contiguous()
    call = CallStruct(
        x.data_ptr(), out.data_ptr(),
        ids_kept.data_ptr(), None if gates_kept is None else gates_kept.data_ptr(),
        *shape, -1, TYPES[x.dtype],
        0 if between is None else ACTIVATIONS.index(between.name), exact, torch.get_num_threads(),
        0.0 if between is None else between.alpha, 0.0 if between is None else between.limit,
        first, second,
    )  # fmt: skip
    run(number, call)
    return out


def _like(bias: Tensor | None, x: Tensor) -> Tensor | None:
    return None if bias is None else bias.to(x.dtype).contiguous()


def routed_experts_now(
    x: Tensor,
    ids: Tensor,
    gates: Tensor,
    first: tuple[Tensor, Tensor, Sequence[int]],
    second: tuple[Tensor, Tensor, Sequence[int]],
    between: Activation,
    biases: tuple[Tensor | None, Tensor | None],
    exact: bool,
) -> Tensor:
    """y[t] = sum over a of gates[t, a] * second[e] @ between(first[e] @ x[t]), e = ids[t, a].

    x [T, H] in float32, bfloat16 or float16; ids [T, A], those outside of [0, E) are no expert;
    gates [T, A]. A stack is buffer, table and numbers; first is packed with paired rows.
    biases: [E, N] and [E, H2]. exact: activations as they are and float32 sums, instead of 8 bits
    per token and 32 features. Returns [T, H2] in the dtype of x.
    MemoryError; ValueError if first is not paired.
    """
    if not first[2][PAIRED]:
        raise ValueError("first: expected a stack packed with paired rows")
    x = x.contiguous()
    out = x.new_empty(x.shape[0], second[2][0])
    kept = (_like(biases[0], x), _like(biases[1], x))
    return _run(
        x, out, ids, gates, (x.shape[0], ids.shape[1]), between, exact,
        stack_struct(*first, kept[0]), stack_struct(*second, kept[1]),
    )  # fmt: skip


def first_product_now(
    x: Tensor,
    ids: Tensor,
    stack: tuple[Tensor, Tensor, Sequence[int]],
    bias: Tensor | None,
    exact: bool,
) -> Tensor:
    """The rows of first[e] @ x[t] for every assignment, ids [T, A] to [T * A, N]; zeros where there
    is no expert."""
    x = x.contiguous()
    T, A = ids.shape
    out = x.new_empty(T * A, stack[2][0])
    kept = _like(bias, x)
    return _run(x, out, ids, None, (T, A), None, exact, stack_struct(*stack, kept), ABSENT)


def _linear(x: Tensor, e: int, stack: StackStruct, exact: bool) -> tuple[Tensor, CallStruct]:
    """The output [T, N], to be written, and the call that does so."""
    out = x.new_empty(x.shape[0], stack.n)
    return out, CallStruct(
        x.data_ptr(), out.data_ptr(), None, None, x.shape[0], 1, e, TYPES[x.dtype], 0, exact,
        torch.get_num_threads(), 0.0, 0.0, stack, ABSENT,
    )  # fmt: skip


def linear_now(x: Tensor, e: int, stack: StackStruct, exact: bool) -> Tensor:
    """x [T, K] times the transpose of matrix e [N, K]."""
    number = tier()
    assert number is not None
    x = x.contiguous()
    out, call = _linear(x, e, stack, exact)
    run(number, call)
    return out


def linears_now(x: Tensor, stacks: Sequence[tuple[StackStruct, bool]]) -> list[Tensor]:
    """x [T, K] times the transposes of the only matrices [N, K] of up to four stacks, in one call
    of C. stacks: each with whether it is exact."""
    number = tier()
    assert number is not None
    x = x.contiguous()
    found = [_linear(x, 0, stack, exact) for stack, exact in stacks]
    run_side_by_side(number, [call for _, call in found])
    return [out for out, _ in found]


def second_product_now(
    mid: Tensor,
    ids: Tensor,
    gates: Tensor,
    stack: tuple[Tensor, Tensor, Sequence[int]],
    bias: Tensor | None,
    exact: bool,
) -> Tensor:
    """The weighted sum over a token's assignments of second[e] @ mid: mid [T * A, I] to [T, H2]."""
    mid = mid.contiguous()
    out = mid.new_empty(ids.shape[0], stack[2][0])
    kept = _like(bias, mid)
    return _run(
        mid,
        out,
        ids,
        gates,
        (ids.shape[0], ids.shape[1]),
        None,
        exact,
        ABSENT,
        stack_struct(*stack, kept),
    )


# Defined by schemas and not by `custom_op`, whose wrappers take twice as long as all the rest.
_LIBRARY = torch.library.Library("qmoe", "FRAGMENT")
_STACK = "Tensor {0}, Tensor {0}_table, int[] {0}_numbers"


def define(
    name: str,
    arguments: str,
    compute: Callable[..., Any],
    fake: Callable[..., Any],
    result: str = "Tensor",
) -> None:
    """A custom op `qmoe::name` with its schema; fake: shapes and dtypes of its result alone."""
    _LIBRARY.define(f"{name}({arguments}) -> {result}")
    _LIBRARY.impl(name, compute, "CPU")
    torch.library.register_fake(f"qmoe::{name}", fake, lib=_LIBRARY)


define(
    "cpu_routed_experts",
    f"Tensor x, Tensor ids, Tensor gates, {_STACK.format('first')}, {_STACK.format('second')}, "
    "str activation, float alpha, float limit, Tensor? first_bias, Tensor? second_bias, bool exact",
    lambda x, ids, gates, a, a_table, a_numbers, b, b_table, b_numbers, name, alpha, limit, *rest:
        routed_experts_now(
            x, ids, gates, (a, a_table, a_numbers), (b, b_table, b_numbers),
            Activation(name, alpha, limit), rest[:2], rest[2],
        ),
    lambda x, ids, gates, a, a_table, a_numbers, b, b_table, b_numbers, *rest:
        x.new_empty(x.shape[0], b_numbers[0]),
)  # fmt: skip
define(
    "cpu_first_product",
    f"Tensor x, Tensor ids, {_STACK.format('first')}, Tensor? bias, bool exact",
    lambda x, ids, *rest: first_product_now(x, ids, rest[:3], *rest[3:]),
    lambda x, ids, first, table, numbers, *rest: x.new_empty(ids.numel(), numbers[0]),
)
define(
    "cpu_second_product",
    f"Tensor mid, Tensor ids, Tensor gates, {_STACK.format('second')}, Tensor? bias, bool exact",
    lambda mid, ids, gates, *rest: second_product_now(mid, ids, gates, rest[:3], *rest[3:]),
    lambda mid, ids, gates, second, table, numbers, *rest: mid.new_empty(ids.shape[0], numbers[0]),
)
define(
    "cpu_linear",
    f"Tensor x, int e, {_STACK.format('stack')}, bool exact",
    lambda x, e, *rest: linear_now(x, e, stack_struct(*rest[:3]), rest[3]),
    lambda x, e, stack, table, numbers, exact: x.new_empty(x.shape[0], numbers[0]),
)

# As the functions above, with a stack as three arguments each.
routed_experts = torch.ops.qmoe.cpu_routed_experts.default
first_product = torch.ops.qmoe.cpu_first_product.default
second_product = torch.ops.qmoe.cpu_second_product.default
linear = torch.ops.qmoe.cpu_linear.default
