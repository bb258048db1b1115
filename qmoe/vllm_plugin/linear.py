"""Linears in vLLM whose weights stay packed.

vLLM joins linears with the same input (q, k and v; gate and up). Their matrices are joined here
too where they are stored alike, and are several pieces where they are not.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import LinearMethodBase

from qmoe.config import Scheme
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import SUFFIXES
from qmoe.format.packing import StoredWords
from qmoe.vllm_plugin.forms import Piece, PlainPiece
from qmoe.vllm_plugin.matrices import check_columns, cut_columns, cut_rows, join_rows, read
from qmoe.vllm_plugin.places import keep, place, take

PLAIN = ""  # the suffix of a weight that is not quantized
Stored = dict[Hashable, dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """A matrix of the checkpoint that is in a linear: shard, vLLM's name for it (None if it is the
    whole linear); first, its first row in the linear; rows, all of its rows; start and size, those
    of this process."""

    shard: Hashable
    first: int
    rows: int
    start: int
    size: int


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Runs one linear of vLLM on packed weights. schemes: of the checkpoint's matrices that are in
    it, None for those that are not quantized."""

    def __init__(self, schemes: Sequence[Scheme | None]):
        self.schemes = schemes
        self.rotation = max((s.rotation for s in schemes if s is not None), default=0)

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Places for the checkpoint's tensors. ConfigError if this process cannot have its part of
        the columns."""
        where = getattr(layer, "prefix", "") or type(layer).__name__
        layer.qmoe_where, layer.qmoe_dtype = where, params_dtype
        layer.qmoe_columns = (input_size_per_partition, input_size)
        layer.qmoe_sizes = list(output_partition_sizes)
        if input_size_per_partition != input_size:
            for scheme in filter(None, self.schemes):
                check_columns(scheme, input_size, input_size_per_partition, where)
        for suffix in (*SUFFIXES, *([PLAIN] if None in self.schemes else [])):
            place(layer, "weight", suffix, params_dtype, partial(_load, layer, suffix))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack what has come. CheckpointError if it is not what the layer needs."""
        stored = take(layer, layer.weight_packed.device)
        if not stored and hasattr(layer, "qmoe_pieces"):
            return
        packed: list[StoredWords] = []
        pieces: list[nn.Module] = []
        for part in _parts(layer):
            found = self._found(layer, part, stored)
            if isinstance(found, StoredWords):
                packed.append(found)
                continue
            pieces += [*self._packed(layer, packed), PlainPiece(found)]
            packed = []
        layer.qmoe_pieces = nn.ModuleList([*pieces, *self._packed(layer, packed)])

    def _packed(self, layer: Any, matrices: Sequence[StoredWords]) -> Iterator[Piece]:
        for matrix in join_rows(matrices):
            yield Piece(matrix, self.rotation, layer.qmoe_dtype, layer.qmoe_where)

    def _found(self, layer: Any, part: Part, stored: Stored) -> StoredWords | Tensor:
        """This process's part of a matrix, packed or not."""
        each, first = stored.get(part.shard), 0
        if each is None:  # joined in the checkpoint too
            each, first = stored.get(None, {}), part.first
        start = first + part.start
        mine, columns = layer.qmoe_columns
        from_column = layer.tp_rank * mine if mine != columns else 0
        where = layer.qmoe_where
        if PLAIN in each:
            rows = each[PLAIN][start : start + part.size]
            return rows[:, from_column : from_column + mine].to(layer.qmoe_dtype).clone()
        matrix = read(each, where)
        if matrix.k != columns or matrix.words.shape[1] < first + part.rows:
            raise CheckpointError(
                f"{where}: the model needs {part.rows} rows of {columns} columns, the checkpoint "
                f"has a matrix [{matrix.words.shape[1]}, {matrix.k}]; config.json and the weights "
                "do not belong together"
            )
        matrix = cut_rows(matrix, start, part.size)
        return matrix if mine == columns else cut_columns(matrix, from_column, mine, where)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[*, K] to [*, N]."""
        rows = x.reshape(-1, x.shape[-1])
        parts = [piece(rows) for piece in layer.qmoe_pieces]
        y: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        missing = sum(layer.qmoe_sizes) - y.shape[-1]  # lm_head: vLLM pads the vocabulary
        if missing:
            y = F.pad(y, (0, missing))
        y = y.view(*x.shape[:-1], -1)
        return y if bias is None else y + bias


def _load(layer: Any, suffix: str, _: Tensor, tensor: Tensor, shard: Any = None) -> None:
    """vLLM's call for a tensor of the checkpoint. A tuple names several matrices that are one in
    the checkpoint."""
    if isinstance(shard, tuple):
        raise CheckpointError(
            f"{layer.qmoe_where}: the checkpoint has some of its matrices joined, which qmoe does "
            "not take apart in vLLM; run the model with `qmoe.load`"
        )
    keep(layer, shard, suffix, tensor)


def _parts(layer: Any) -> Iterator[Part]:
    """The matrices of a linear in the order of its rows."""
    indices = getattr(layer, "shard_indices", None)
    if indices is not None:  # lm_head
        start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
        yield Part(None, 0, layer.org_vocab_size, start, end - start)
        return
    sizes = layer.qmoe_sizes
    shards: list[Hashable] = list(range(len(sizes))) if hasattr(layer, "output_sizes") else [None]
    totals = list(getattr(layer, "output_sizes", [layer.output_size]))
    copies = [1] * len(sizes)
    if hasattr(layer, "num_kv_head_replicas"):
        head, heads, keys = layer.head_size, layer.total_num_heads, layer.total_num_kv_heads
        shards = ["q", "k", "v"]
        totals = [heads * head, keys * head, keys * layer.v_head_size]
        copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas]
    first = 0
    for shard, total, size, copy in zip(shards, totals, sizes, copies, strict=True):
        start = 0 if size == total else layer.tp_rank // copy * size
        yield Part(shard, first, total, start, size)
        first += total
