"""A whole decoder layer for one new token of each sequence, in one call of C.

Between the calls of a layer's parts Python takes longer than many of the parts themselves. Values
are computed and rounded as by the separate calls, so they have the same bits.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu.attention import RmsNorm
from qmoe.kernels.cpu.layout import TYPES
from qmoe.kernels.cpu.library import StackStruct, library, tier
from qmoe.kernels.cpu.ops import ACTIVATIONS
from qmoe.kernels.cpu.router import Routing

MOST_SEQUENCES = 8
_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float


class LayerStruct(ctypes.Structure):
    """`Layer` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("projection", StackStruct * 4), ("first", StackStruct), ("second", StackStruct),
        ("bias", _P * 4), ("before", _P), ("after", _P), ("row_norm", _P * 2),
        ("head_norm", _P * 2), ("router", _P), ("router_bias", _P), ("width", _I), ("heads", _I),
        ("key_heads", _I), ("head_width", _I), ("type", _I), ("exact", _I), ("experts", _I),
        ("choices", _I), ("normed", _I), ("score_type", _I), ("activation", _I),
        ("norm_type", _I * 4), ("early", _I * 4), ("epsilon", _F * 4), ("shift", _F * 4),
        ("alpha", _F), ("limit", _F), ("scale", _F),
    ]  # fmt: skip


class StepStruct(ctypes.Structure):
    """`Step` of csrc/qmoe_cpu.h."""

    _fields_ = [
        ("x", _P), ("cos", _P), ("sin", _P), ("out", _P), ("keys", _P), ("values", _P),
        ("key_stride", _I * 3), ("value_stride", _I * 3), ("tokens", _I), ("past", _I),
        ("positions", _I), ("turned", _I), ("threads", _I),
    ]  # fmt: skip


@dataclass(frozen=True)
class Norm:
    """An RMS norm: its weight and how it is written."""

    weight: Tensor
    kind: RmsNorm


@dataclass(frozen=True)
class Layer:
    """x + attention(norm(x)), of which norm, router and experts give what is added to that.

    projections: of queries, keys, values and of the output, E = 1, with their biases [N]. norms:
    before the attention and before the experts, and of queries and keys, each of whole rows or,
    with as many weights as a head has, of every head. dtype: of all rows. experts: first (paired)
    and second stack with their biases in `StackStruct`.
    """

    projections: Sequence[tuple[StackStruct, Tensor | None]]
    norms: Sequence[Norm | None]
    head_width: int
    scale: float
    router: tuple[Tensor, Tensor | None, Routing]
    experts: Sequence[StackStruct]
    activation: Activation
    dtype: torch.dtype
    exact: bool

    def struct(self) -> LayerStruct:
        """As C takes it, valid as long as the tensors are."""
        weight, router_bias, routing = self.router
        of_heads = [norm is not None and len(norm.weight) == self.head_width for norm in self.norms]
        weights = [_address(None if norm is None else norm.weight) for norm in self.norms]
        rows = [None if alone else w for w, alone in zip(weights[2:], of_heads[2:], strict=True)]
        heads = [w if alone else None for w, alone in zip(weights[2:], of_heads[2:], strict=True)]
        kinds = [norm.kind if norm else RmsNorm(0.0, 0.0, False) for norm in self.norms]
        types = [TYPES[norm.weight.dtype] if norm else 0 for norm in self.norms]
        (q, _), (k, _) = self.projections[:2]
        return LayerStruct(
            tuple(stack for stack, _ in self.projections), *self.experts,
            tuple(_address(bias) for _, bias in self.projections),
            *weights[:2], tuple(rows), tuple(heads), weight.data_ptr(), _address(router_bias), q.k,
            q.n // self.head_width, k.n // self.head_width, self.head_width, TYPES[self.dtype],
            self.exact, len(weight),
            routing.choices, routing.normed,
            TYPES[torch.float32 if routing.wide else self.dtype],
            ACTIVATIONS.index(self.activation.name), tuple(types),
            tuple(kind.early for kind in kinds), tuple(kind.epsilon for kind in kinds),
            tuple(kind.shift for kind in kinds), self.activation.alpha, self.activation.limit,
            self.scale,
        )  # fmt: skip


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def decode(
    layer: LayerStruct,
    x: Float[Tensor, "B H"],
    rotary: tuple[Float[Tensor, "P R"], Float[Tensor, "P R"]],
    keys: Float[Tensor, "B G S D"],
    values: Float[Tensor, "B G S D"],
    past: int,
) -> Float[Tensor, "B H"]:
    """The layer's output for a new token of each of up to MOST_SEQUENCES sequences.

    rotary: cosines and sines, P = 1 or B, all contiguous and in the dtype of x. keys, values: room
    of S > past tokens, of which `past` are there; what the new tokens have is written at `past`.
    MemoryError, before which nothing is promised of what is at `past`.
    """
    x = x.contiguous()
    number, lib, out = tier(), library(), torch.empty_like(x)
    assert number is not None and lib is not None and past < keys.shape[2]
    cos, sin = rotary
    step = StepStruct(
        x.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), keys.data_ptr(),
        values.data_ptr(), keys.stride()[:3], values.stride()[:3], len(x), past, *cos.shape,
        torch.get_num_threads(),
    )  # fmt: skip
    if lib.qmoe_decode(number, ctypes.byref(layer), ctypes.byref(step)):
        raise MemoryError("the CPU kernels could not allocate their buffers")
    return out
