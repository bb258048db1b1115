"""Stored matrices as vLLM's processes take them: read from a checkpoint's tensors, cut into the
part of one process, and joined where vLLM joins linears. Pure functions; no vLLM.

Everything about a matrix except its rotation follows from its stored tensors, so experts of
different widths need no table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor

from qmoe.config import BITS, CHANNEL, GROUPS, Scheme
from qmoe.errors import CheckpointError, ConfigError
from qmoe.format.packing import StoredWords, packed_words, unpack_zeros

WORD = 32  # bits


def read(stored: Mapping[str, Tensor], where: str) -> StoredWords:
    """One matrix as a stack [1, N, K] from its tensors by suffix ("_packed", "_scale", "_shape",
    and "_zero_point" if it has zero points).

    CheckpointError if a tensor is missing, or the tensors contradict each other.
    """
    missing = [s for s in ("_packed", "_scale", "_shape") if s not in stored]
    if missing:
        names = ", ".join(f"weight{suffix}" for suffix in missing)
        raise CheckpointError(f"{where}: the checkpoint has no {names}; quantize the model again")
    n, k = stored["_shape"].tolist()
    words, scale = stored["_packed"], stored["_scale"]
    found = [bits for bits in BITS if words.shape == (n, packed_words(k, bits))]
    groups = scale.shape[-1]
    group = CHANNEL if groups == 1 else k // groups
    if len(found) != 1 or scale.shape[0] != n or group not in (*GROUPS, CHANNEL) or k % groups:
        raise CheckpointError(
            f"{where}: expected the tensors of a matrix [{n}, {k}] of one of {BITS} bits, found "
            f"words {list(words.shape)} and scales {list(scale.shape)}; the file is damaged, or "
            "another program wrote it"
        )
    least, most = torch.aminmax(scale)
    if not (least > 0 and most < torch.inf):
        raise CheckpointError(f"{where}: weight_scale has values that are not positive numbers")
    zero = None
    if "_zero_point" in stored:
        zero = unpack_zeros(stored["_zero_point"][None], found[0], n)
    scheme = Scheme(found[0], group, zero is None)
    return StoredWords(words[None], k, scale[None], zero, scheme)


def cut_rows(matrix: StoredWords, start: int, size: int) -> StoredWords:
    """Rows (output features) start to start + size of every matrix of a stack."""
    rows = slice(start, start + size)
    zero = None if matrix.zero is None else matrix.zero[:, rows]
    return replace(matrix, words=matrix.words[:, rows], scale=matrix.scale[:, rows], zero=zero)


def cut_columns(matrix: StoredWords, start: int, size: int, where: str) -> StoredWords:
    """Columns (input features) start to start + size of every matrix of a stack; start is a
    multiple of size. A group that goes over the edge is made two, which have its scale.

    ConfigError if the columns are no whole words, or groups would become too small.
    """
    bits, groups = matrix.scheme.bits, matrix.scale.shape[-1]
    piece = check_columns(matrix.scheme, matrix.k, size, where)
    words = matrix.words[..., start * bits // WORD : (start + size) * bits // WORD]
    if groups == 1:
        return replace(matrix, words=words, k=size)
    mine = slice(start // piece, (start + size) // piece)

    def finer(each: Tensor) -> Tensor:
        return each.repeat_interleave(matrix.k // groups // piece, -1)[..., mine]

    zero = None if matrix.zero is None else finer(matrix.zero)
    group = CHANNEL if piece == size else piece
    scheme = replace(matrix.scheme, group_size=group)
    return StoredWords(words, size, finer(matrix.scale), zero, scheme)


def check_columns(scheme: Scheme, k: int, size: int, where: str) -> int:
    """The columns that share a scale when a matrix with k of them is cut into parts of `size`;
    size where there is one scale per row. ConfigError if that is impossible (`cut_columns`)."""
    several = scheme.groups(k) > 1
    piece = gcd(scheme.group_size, size) if several else size
    reason = ""
    if size * scheme.bits % WORD:
        reason = f"{size} values of {scheme.bits} bits are no whole words of {WORD} bits"
    elif several and piece < GROUPS[0]:
        reason = f"groups of {scheme.group_size} would become groups of {piece}"
    elif scheme.rotation and size % scheme.rotation:
        reason = f"its inputs are rotated in blocks of {scheme.rotation}"
    if reason:
        raise ConfigError(
            f"tensor parallel: {where} cannot be cut from {k} into parts of {size} input features: "
            f"{reason}; use fewer processes, or --enable-expert-parallel for experts"
        )
    return piece


def join_rows(matrices: Sequence[StoredWords]) -> list[StoredWords]:
    """Neighbouring matrices of one kind as one with the rows of all; others as they are."""
    joined: list[StoredWords] = []
    for matrix in matrices:
        if joined and _kind(joined[-1]) == _kind(matrix):
            joined[-1] = _on_top(joined[-1], matrix)
        else:
            joined.append(matrix)
    return joined


def _kind(matrix: StoredWords) -> tuple[Scheme, int, int]:
    return matrix.scheme, matrix.k, matrix.scale.shape[-1]


def _on_top(a: StoredWords, b: StoredWords) -> StoredWords:
    zero = None if a.zero is None or b.zero is None else torch.cat([a.zero, b.zero], 1)
    words, scale = torch.cat([a.words, b.words], 1), torch.cat([a.scale, b.scale], 1)
    return replace(a, words=words, scale=scale, zero=zero)
