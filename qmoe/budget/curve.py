"""What other numbers of bytes would have brought: the predicted KL of the best choice of each."""

from dataclasses import replace
from typing import Any

from qmoe.budget.choose import choose
from qmoe.budget.measurements import Measurements
from qmoe.budget.memory import Memory, average_bits
from qmoe.config import BITS, QuantConfig

AVERAGES = (2.0, 2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)  # scales left out


def curve(
    memory: Memory, config: QuantConfig, measurements: Measurements
) -> list[dict[str, float]]:
    """From everything at the fewest bits to everything at the most: "bytes" as the budget counts
    them, "bits" of a quantized weight on average, scales counted, and "predicted_kl" in nats per
    token, of the choice with the least one."""
    least, most = (memory.total(_all_at(config, bits)) for bits in (min(BITS), max(BITS)))
    found = []
    for average in AVERAGES:
        share = (average - min(BITS)) / (max(BITS) - min(BITS))
        chosen = choose(memory, config, measurements, int(least + share * (most - least)))
        bits = average_bits(memory.source, chosen.config)
        found.append(
            {"bytes": chosen.nbytes, "bits": bits, "predicted_kl": float(chosen.predicted)}
        )
    return found


def _all_at(config: QuantConfig, bits: int) -> QuantConfig:
    own = {name: getattr(config, name) for name in ("experts", "dense", "lm_head")}
    changes: dict[str, Any] = {n: s and replace(s, bits=bits) for n, s in own.items()}
    return replace(config, **changes)
