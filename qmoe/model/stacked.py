"""Packed weights of several matrices, which are stored one by one and loaded into one tensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Stacked:
    """A packed weight: its parameter, its experts (None for a linear), and of how many matrices its
    rows (per expert) are made. shorter: by suffix, the shape of each expert's stored matrices, if
    they are not all that of their place in the parameter."""

    target: str
    experts: int | None
    parts: int
    shorter: Mapping[str, Sequence[tuple[int, int]]]


def padded(matrices: Sequence[Tensor]) -> list[Tensor]:
    """All as large as the largest in either dimension, with zeros behind."""
    rows, columns = (max(m.shape[i] for m in matrices) for i in (0, 1))
    return [nn.functional.pad(m, (0, columns - m.shape[1], 0, rows - m.shape[0])) for m in matrices]
