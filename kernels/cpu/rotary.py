"""Heads of queries and keys on a CPU: normalised and rotated by their positions, in one call."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.kernels.cpu.attention import WIDEST, RmsNorm
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import TurnStruct, tier, turn


@dataclass(frozen=True)
class HeadNorm:
    """A norm of every head by itself: its weight [D] and how it is written."""

    weight: Tensor
    kind: RmsNorm


def turn_now(
    heads: list[tuple[Tensor, HeadNorm | None]],
    cos: Float[Tensor, "P R"],
    sin: Float[Tensor, "P R"],
) -> None:
    """Normalise, where there is a norm, and rotate heads in place.

    heads: [T, H, D] with an H of its own each, contiguous, in the dtype of cos and sin (float32,
    bfloat16 or float16), D up to 256. The first R values of each are rotated in halves, as in
    GPT-NeoX (Su et al. 2021, RoFormer): x cos + (-second half, first half) sin, with torch's
    rounding after each operation. Token t has row t % P of cos and sin.
    """
    number = tier()
    assert number is not None
    (P, R), dtype = cos.shape, TYPES[cos.dtype]
    cos, sin = cos.contiguous(), sin.contiguous()
    turns = []
    for x, norm in heads:
        T, H, D = x.shape
        assert x.is_contiguous() and x.dtype == cos.dtype and R <= D <= WIDEST
        where = (x.data_ptr(), cos.data_ptr(), sin.data_ptr())
        if norm is None:
            turns.append(TurnStruct(*where, None, T, P, H, D, R, dtype))
            continue
        weight, kind = norm.weight, norm.kind
        turns.append(
            TurnStruct(
                *where,
                weight.data_ptr(),
                T,
                P,
                H,
                D,
                R,
                dtype,
                TYPES[weight.dtype],
                kind.early,
                kind.epsilon,
                kind.shift,
            )  # fmt: skip
        )
    turn(number, turns, torch.get_num_threads())
