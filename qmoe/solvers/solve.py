"""One call for all methods: a stack and its Hessian in, stored integers and what happened out."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.config import Method, Scheme
from qmoe.format.grid import dequantize, rows_at_bounds
from qmoe.format.hadamard import rotate, rotate_moments
from qmoe.format.quantized import Quantized, common
from qmoe.format.trellis import Stack, Trellis, join_trellis
from qmoe.solvers.awq import output_error
from qmoe.solvers.gptq import gptq
from qmoe.solvers.rtn import rtn
from qmoe.solvers.trellis import code_stack
from qmoe.system.devices import CPU

CHUNK_BYTES = 1 << 27  # of Hessians solved at once; the solver's peak is about eight times that


@dataclass(frozen=True)
class Solved:
    """error: per expert, RMS output error relative to the RMS output on its calibration tokens
    (0 for an expert that saw none; empty without statistics). damped, rounded: see GptqResult.
    bounded: expert -> rows for which the dtype of scales has none near (grid.rows_at_bounds)."""

    quantized: Stack
    error: list[float]
    damped: dict[int, float] = field(default_factory=dict)
    rounded: list[int] = field(default_factory=list)
    bounded: dict[int, int] = field(default_factory=dict)


def solve(
    weight: Float[Tensor, "E N K"],
    hessian: Float[Tensor, "E K K"] | None,
    scheme: Scheme,
    method: Method,
    *,
    scale_dtype: torch.dtype,
    act_order: bool,
    damp: float,
    search_grid: bool,
) -> Solved:
    """Quantize a stack, rotated first if its scheme says so. AWQ's scales are already in the
    weights, so it rounds to nearest here.

    Only plain rounding can do without a Hessian. Takes several copies of the Hessians: give it
    `experts_at_once` of a large stack, and `join` what comes back. Computed where the weights are;
    the Hessian may be elsewhere, and the integers are in the machine's own memory.
    """
    rotated, scheme = scheme, replace(scheme, rotation=0)
    weight = rotate(weight.float(), rotated.rotation) if rotated.rotation else weight
    rows = rows_at_bounds(weight, scheme, scale_dtype).tolist()
    bounded = {e: count for e, count in enumerate(rows) if count}
    if hessian is None:
        made = replace(rtn(weight, scheme, scale_dtype).to(CPU), scheme=rotated)
        return Solved(made, [], bounded=bounded)
    hessian = rotate_moments(hessian.to(weight.device), rotated.rotation)
    damped: dict[int, float] = {}
    rounded: list[int] = []
    if method.endswith("gptq"):
        result = gptq(
            weight,
            hessian,
            scheme,
            scale_dtype=scale_dtype,
            act_order=act_order,
            damp=damp,
            search_grid=search_grid,
        )
        quantized, damped, rounded = result.quantized, result.damped, result.rounded
        lost, total = result.lost, result.total
    else:
        quantized = rtn(weight, scheme, scale_dtype)
        lost = output_error(dequantize(quantized) - weight, hessian)
        total = output_error(weight.float(), hessian)
    ratio = torch.where(total == 0, 0.0, lost.clamp(min=0) / total)
    made = replace(quantized.to(CPU), scheme=rotated)
    return Solved(made, ratio.sqrt().tolist(), damped, rounded, bounded)


def in_order(parts: list[tuple[list[int], Solved]]) -> Solved:
    """The solution of a stack from those of some of its matrices each, with their places in it."""
    places = [e for some, _ in parts for e in some]
    joined = join([solved for _, solved in parts])
    made = joined.quantized
    assert isinstance(made, Quantized)  # codes have one rate
    order = torch.tensor(places).argsort()
    widths = made.widths or (made.scheme.bits,) * len(places)
    scheme, differing = common(made.scheme, [widths[i] for i in order])
    zero = None if made.zero is None else made.zero[order]
    ordered = Quantized(made.q[order], made.scale[order], zero, scheme, differing)
    return Solved(
        ordered,
        [joined.error[i] for i in order] if joined.error else [],
        {places[i]: amount for i, amount in sorted(joined.damped.items())},
        sorted(places[i] for i in joined.rounded),
        {places[i]: rows for i, rows in sorted(joined.bounded.items())},
    )


def solve_codes(
    weight: Float[Tensor, "E N K"],
    hessian: Float[Tensor, "E K K"] | None,
    scheme: Scheme,
    parts: int,
    *,
    damp: float,
    beam: int,
) -> Solved:
    """Quantize a stack to EXL3's codes, in the machine's own memory. parts: matrices that an
    expert's rows are made of, each coded on its own."""
    H = None if hessian is None else hessian.to(CPU, torch.float32)
    coded = [
        code_stack(part, H, scheme, damp=damp, beam=beam)
        for part in weight.to(CPU, torch.float32).chunk(parts, dim=1)
    ]
    lost, total = (sum(getattr(part, key) for part in coded) for key in ("lost", "total"))
    error = torch.where(total == 0, 0.0, lost.clamp(min=0) / total).sqrt()
    damped = {e: amount for part in coded for e, amount in part.damped.items()}
    whole = Trellis(tuple(part.codes for part in coded), scheme)
    return Solved(whole, [] if H is None else error.tolist(), damped, coded[0].alone)


def experts_at_once(in_features: int) -> int:
    """How many matrices of a stack to solve in one call."""
    return max(1, CHUNK_BYTES // (4 * in_features**2))


def join(parts: list[Solved]) -> Solved:
    """The solution of a stack from those of its parts, in order."""
    errors: list[float] = []
    damped: dict[int, float] = {}
    rounded: list[int] = []
    bounded: dict[int, int] = {}
    start = 0
    for part in parts:
        errors += part.error
        damped |= {start + e: amount for e, amount in part.damped.items()}
        rounded += [start + e for e in part.rounded]
        bounded |= {start + e: rows for e, rows in part.bounded.items()}
        start += len(part.quantized.scale)
    whole = _join([part.quantized for part in parts])
    return Solved(whole, errors, damped, rounded, bounded)


def _join(stacks: list[Stack]) -> Stack:
    coded = [stack for stack in stacks if isinstance(stack, Trellis)]
    if coded:
        return join_trellis(coded)
    parts = [stack for stack in stacks if isinstance(stack, Quantized)]
    zeros = [part.zero for part in parts if part.zero is not None]
    widths = [part.scheme_of(e).bits for part in parts for e in range(len(part.q))]
    return Quantized(
        torch.cat([part.q for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat(zeros) if zeros else None,
        *common(parts[0].scheme, widths),
    )
