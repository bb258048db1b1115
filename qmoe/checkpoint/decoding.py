"""Checkpoints published in 8 or 4 bits, read as the 16-bit ones they stand for.

fp8    DeepSeek-V3's own format: float8 [N, K] and one scale per block of 128 x 128 (or what
       `weight_block_size` says), in <name>_scale_inv.
mxfp4  gpt-oss: blocks of 32 4-bit floats [E, N, K/32, 16 bytes] and an exponent each, in
       <name>_blocks and <name>_scales (OCP Microscaling Formats, section 5).

A `Decoded` stands in for a safetensors slice: shape and dtype now, data when indexed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qmoe.errors import CheckpointError

# What the parameters that qmoe loads are made of: stored names, and how they are computed.
Made = dict[str, tuple[tuple[str, ...], Callable[..., Tensor]]]
Read = Callable[[str], Tensor]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCK = 128
FP8, SCALES = ("F8_E4M3", "F8_E5M2"), ("F32", "BF16", "F16", "F8_E8M0")


@dataclass(frozen=True)
class Decoded:
    """A tensor that is computed from stored ones. parts: their names. dtype: as safetensors calls
    it. encoded: whether its parts are a code for it, and not the same numbers in another form."""

    shape: tuple[int, ...]
    parts: tuple[str, ...]
    compute: Callable[[], Tensor]
    dtype: str = "BF16"
    encoded: bool = True

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        return self.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.compute()[index]


def decoded(config: Any, where: str, slices: dict[str, Any], read: Read) -> dict[str, Decoded]:
    """The tensors that `quantization_config` says are encoded, by the name of what they stand for;
    empty if it says nothing. slices: of every stored tensor; read: gives one by name. Raises
    CheckpointError for a format that qmoe does not read, and for parts that do not fit together."""
    if config is None:
        return {}
    method = config.get("quant_method") if isinstance(config, dict) else config
    if method == "fp8":
        size = config.get("weight_block_size") or [BLOCK, BLOCK]
        return _fp8(where, slices, read, size)
    if method == "mxfp4":
        return _mxfp4(where, slices, read)
    raise CheckpointError(
        f"{where}: already quantized ({method}); give the original model, or one in its maker's "
        "fp8 or mxfp4"
    )


def _fp8(where: str, slices: dict[str, Any], read: Read, size: Any) -> dict[str, Decoded]:
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size)):
        raise CheckpointError(f"{where}: expected weight_block_size [rows, columns], found {size}")
    out = {}
    for name, stored in slices.items():
        scale_name = f"{name}_scale_inv"
        if scale_name not in slices:
            continue
        shape, blocks = tuple(stored.get_shape()), tuple(slices[scale_name].get_shape())
        wanted = (*shape[:-2], *(-(-n // b) for n, b in zip(shape[-2:], size, strict=False)))
        if len(shape) < 2 or blocks != wanted:
            raise CheckpointError(
                f"{where}: {scale_name} has shape {blocks}, {name} {shape} needs {wanted}"
            )
        _check_kind(where, name, stored, FP8)
        _check_kind(where, scale_name, slices[scale_name], SCALES)
        parts = (name, scale_name)
        out[name] = Decoded(shape, parts, partial(_decode_fp8, read, parts, size))
    return out


def _check_kind(where: str, name: str, stored: Any, kinds: tuple[str, ...]) -> None:
    """Numbers of another kind would decode to something else, or not at all."""
    if stored.get_dtype() not in kinds:
        raise CheckpointError(
            f"{where}: {name!r} is stored as {stored.get_dtype()}; its format needs "
            f"{' or '.join(kinds)}"
        )


def fp8(weight: Tensor, scale: Tensor, size: list[int]) -> Tensor:
    """Float8 [.., N, K] times the scale of each block of `size`, in bfloat16."""
    rows = scale.float().repeat_interleave(size[0], -2)[..., : weight.shape[-2], :]
    each = rows.repeat_interleave(size[1], -1)[..., : weight.shape[-1]]
    return (weight.float() * each).to(torch.bfloat16)


def _mxfp4(where: str, slices: dict[str, Any], read: Read) -> dict[str, Decoded]:
    out = {}
    for blocks in [name for name in slices if name.endswith("_blocks")]:
        name = blocks.removesuffix("_blocks")
        scales = f"{name}_scales"
        shape = tuple(slices[blocks].get_shape())
        found = tuple(slices[scales].get_shape()) if scales in slices else None
        if len(shape) != 4 or shape[-1] != 16 or found != shape[:-1]:
            raise CheckpointError(
                f"{where}: {blocks} has shape {shape} and its scales {found}; expected "
                "[E, N, K/32, 16] and [E, N, K/32]"
            )
        _check_kind(where, blocks, slices[blocks], ("U8",))
        _check_kind(where, scales, slices[scales], ("U8",))
        E, N, G, _ = shape
        parts = (blocks, scales)
        out[name] = Decoded((E, 32 * G, N), parts, partial(_decode_mxfp4, read, parts))
    return out


def _decode_fp8(read: Read, parts: tuple[str, str], size: list[int]) -> Tensor:
    return fp8(read(parts[0]), read(parts[1]), size)


def _decode_mxfp4(read: Read, parts: tuple[str, str]) -> Tensor:
    return mxfp4(read(parts[0]), read(parts[1]))


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[E, N, G, 16] bytes and [E, N, G] exponents as [E, K, N] in bfloat16, the way gpt-oss lays
    out its experts. The low half of a byte comes first; an exponent is 2^(byte - 127)."""
    values = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float32)
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [E, N, G, 32]
    numbers = torch.ldexp(values[pairs.int()], scales.int()[..., None] - 127)
    return numbers.flatten(-2).mT.to(torch.bfloat16).contiguous()
