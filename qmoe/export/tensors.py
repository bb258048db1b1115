"""Which tensors a GGUF has, and what of the checkpoint each is made of.

Names are looked up in the `gguf` package's own table (TensorNameMap). llama.cpp keeps the experts
of a layer in one tensor, the two halves of DeepSeek's kv_b_proj in two, the first of them
transposed, and the rows of Llama's q and k in another order.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from qmoe.checkpoint.reader import Checkpoint
from qmoe.config import Scheme
from qmoe.errors import UnsupportedModelError
from qmoe.export.families import Family
from qmoe.format.compressed_tensors import SUFFIXES, Schemes
from qmoe.format.packing import unpack_rows, unpack_zeros
from qmoe.format.quantized import Quantized
from qmoe.model.leftovers import LAYER, PREDICTS

EXPERT = re.compile(r"(.*\.experts)\.(?:expert_)?(\d+)\.(.*)")
# What the table does not know by its name in a checkpoint.
RENAMED = {"e_score_correction_bias": "e_score_correction.bias", "sinks": "sinks.weight"}


@dataclass(frozen=True)
class Entry:
    """A tensor of the GGUF.

    stored: the weights it is made of, by their names in the checkpoint: one, or one per expert.
    scheme: how they are packed; None if they are not.
    rows: which rows of a matrix it has, in which order, [R]; or [P, R], and then it has P matrices.
        Of a vector, its values.
    transposed: its matrices are stored the other way round.
    """

    name: str
    stored: tuple[str, ...]
    scheme: Scheme | None = None
    rows: Tensor | None = None
    transposed: bool = False


def prediction_tensors(checkpoint: Checkpoint, family: Family) -> list[str]:
    """Those of layers that predict tokens beyond the next: by their names, or behind the last of
    the layers that config.json counts."""
    found = []
    for name in checkpoint.names():
        behind = LAYER.fullmatch(name)
        if PREDICTS.search(name) or (behind and int(behind[2]) >= family.layers):
            found.append(name)
    return found


def entries(checkpoint: Checkpoint, schemes: Schemes, family: Family) -> list[Entry]:
    """The tensors of a GGUF of this checkpoint, without layers that predict tokens beyond the next.
    UnsupportedModelError for one that llama.cpp has no place for."""
    table = gguf.get_tensor_name_map(family.arch, family.layers)
    left_out = set(prediction_tensors(checkpoint, family))
    names = [name for name in checkpoint.names() if name not in left_out]
    packed = {n.removesuffix("_packed") for n in names if n.endswith(".weight_packed")}
    parts = tuple(f".weight{suffix}" for suffix in SUFFIXES)
    plain = [n for n in names if not n.endswith(parts)]
    found = []
    for name, stored in _stacked([*plain, *packed]).items():
        scheme = schemes.of(stored[0].removesuffix(".weight")) if stored[0] in packed else None
        for part, rows, transposed in _parts(name, family):
            target = table.get_name(part, try_suffixes=(".weight", ".bias"))
            if target is None:
                raise UnsupportedModelError(
                    f"{checkpoint.path}: llama.cpp's {family.arch_name} has no tensor for "
                    f"{stored[0]}; this variant of the family cannot be exported"
                )
            found.append(Entry(target, stored, scheme, rows, transposed))
    return sorted(found, key=lambda entry: _order(entry.name))


def _order(name: str) -> tuple[int, str]:
    """Layers by their number, what is outside them first."""
    block = re.match(r"blk\.(\d+)\.", name)
    return (int(block[1]) if block else -1, name)


def _stacked(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Weights by name, those of the experts of a layer together under one."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        expert = EXPERT.fullmatch(name)
        whole, e = (f"{expert[1]}.{expert[3]}", int(expert[2])) if expert else (name, 0)
        found.setdefault(whole, {})[e] = name
    return {whole: tuple(parts[e] for e in sorted(parts)) for whole, parts in found.items()}


def _parts(name: str, family: Family) -> list[tuple[str, Tensor | None, bool]]:
    """By the names of the table: what a stored tensor becomes, the rows of each, and whether it is
    transposed."""
    for last, other in RENAMED.items():
        if name.endswith(f".{last}"):
            name = name.removesuffix(last) + other
    if name.endswith("experts.gate_up_proj_bias"):
        both = torch.arange(2 * family.expert_size).view(-1, 2)  # gate and up alternate
        stem = name.removesuffix("gate_up_proj_bias")
        return [
            (f"{stem}{p}.bias", both[:, i], False) for i, p in enumerate(("gate_proj", "up_proj"))
        ]
    if name.endswith("experts.down_proj_bias"):
        return [(name.replace("down_proj_bias", "down_proj.bias"), None, False)]
    if family.latent and name.endswith("kv_b_proj.weight"):
        keys, values = family.latent
        rows = torch.arange(family.heads * (keys + values)).view(family.heads, -1)
        stem = name.removesuffix("kv_b_proj.weight")
        return [
            (f"{stem}k_b_proj.weight", rows[:, :keys], True),
            (f"{stem}v_b_proj.weight", rows[:, keys:], False),
        ]
    for part, heads in (("q_proj", family.heads), ("k_proj", family.kv_heads)):
        if family.permuted and f".self_attn.{part}." in name:
            return [(name, _pairs(heads, family.head_size), False)]
    return [(name, None, False)]


def _pairs(heads: int, size: int) -> Tensor:
    """The order of rows in which those that rotary embeddings turn together are neighbors; in the
    checkpoint they are half a head apart."""
    return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).flatten()


def read_quantized(checkpoint: Checkpoint, name: str, scheme: Scheme) -> Quantized:
    """A packed weight of the checkpoint, as a stack of one matrix."""
    n, k = checkpoint.tensor(f"{name}_shape").tolist()
    zero = None
    if not scheme.symmetric:
        zero = unpack_zeros(checkpoint.tensor(f"{name}_zero_point")[None], scheme.bits, n)
    q = unpack_rows(checkpoint.tensor(f"{name}_packed")[None], scheme.bits, k)
    return Quantized(q, checkpoint.tensor(f"{name}_scale")[None], zero, scheme)
