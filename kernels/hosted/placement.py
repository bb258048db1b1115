"""Which routed experts lie on a GPU, and who computes the others: pure functions.

An expert that is not on the GPU is either computed by the CPU, which reads its bytes in host
memory, or copied to the GPU, which then takes no time worth counting. For few rows the CPU is
faster, since host memory is faster than the bus; for many rows the copy is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Sizes = Mapping[str, Sequence[float]]  # by experts module, a number for each of its experts


@dataclass(frozen=True)
class Rates:
    """Seconds for a byte of packed experts. copy: to bring it to the GPU. read: to multiply it with
    one row on the CPU. row: for each row more. known: "measured" or "assumed"."""

    copy: float
    read: float
    row: float
    known: str

    def on_cpu(self, nbytes: float, rows: int) -> float:
        """Seconds of the CPU for an expert of so many bytes, with so many rows."""
        return nbytes * (self.read + self.row * (rows - 1))


# PCIe 4.0 with 16 lanes, two channels of DDR5, and a row for a fiftieth of the reading.
ASSUMED = Rates(copy=1 / 25e9, read=1 / 60e9, row=0.02 / 60e9, known="assumed")


def hottest(counts: Sizes, nbytes: Sizes, room: int) -> dict[str, list[int]]:
    """The experts that lie in `room` bytes of the GPU, by module: those with the most tokens for a
    byte, in one ranking over all modules. Among equals, the first ones of every module.

    counts: tokens that each expert saw. nbytes: that it takes.
    """
    ranked = sorted(
        (-counts[name][e] / nbytes[name][e], e, i, name)
        for i, name in enumerate(nbytes)
        for e in range(len(nbytes[name]))
    )
    hot: dict[str, list[int]] = {name: [] for name in nbytes}
    for _, e, _, name in ranked:
        if nbytes[name][e] <= room:
            room -= int(nbytes[name][e])
            hot[name].append(e)
    return {name: sorted(chosen) for name, chosen in hot.items()}


def hit_rate(counts: Sizes, hot: Mapping[str, Sequence[int]]) -> float:
    """The share of assignments of tokens to experts that go to those on the GPU. 0 for none."""
    every = sum(sum(each) for each in counts.values())
    on_gpu = sum(counts[name][e] for name, chosen in hot.items() for e in chosen)
    return on_gpu / every if every else 0.0


def shared_out(
    rows: Mapping[int, int], nbytes: Sequence[float], rates: Rates
) -> tuple[list[int], list[int]]:
    """Who computes the experts that are not on the GPU: those that are copied there, and those that
    the CPU computes meanwhile, so that the slower of the two is done as early as can be.

    rows: of each expert that has some. nbytes: of every expert. The experts with most rows are
    copied.
    """
    ordered = sorted(rows, key=lambda e: (-rows[e], e))
    cpu = sum(rates.on_cpu(nbytes[e], rows[e]) for e in ordered)
    copy, best, count = 0.0, cpu, 0
    for i, e in enumerate(ordered, 1):
        copy += nbytes[e] * rates.copy
        cpu -= rates.on_cpu(nbytes[e], rows[e])
        if max(copy, cpu) < best:
            best, count = max(copy, cpu), i
    return ordered[:count], ordered[count:]
