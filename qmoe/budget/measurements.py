"""What is measured of every matrix, and what that says a choice of widths costs.

A group is a stack of experts, a list of experts that are modules, or a linear. Its matrices at
PROBE bits change the model's output by `kl`, measured with all else as in the original. A matrix
has a part in that by its output error at PROBE bits and by how much its expert adds to the layer's
output. Any other width changes it in proportion to the error, since KL is quadratic in small
errors; groups are taken as independent.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from qmoe.budget.ways import COUNT
from qmoe.checkpoint.folders import read_json
from qmoe.config import BITS
from qmoe.errors import CheckpointError, ConfigError

PROBE = 3  # bits at which groups are tried in the model
FILE = "measurements.json"
OTHER_TEXT = 1 / 16  # of an average expert's tokens, that text of another kind may bring to any
DEVIATIONS = 2  # of a count of tokens, to be on the safe side


@dataclass(frozen=True)
class Measured:
    """A stack of experts, or a linear.

    target: its name in `QuantConfig.widths`. layer: the decoder layer it is in. group: see above.
    tokens: that each expert saw. errors: of each matrix, in each of its ways (ways.py), the squared
    output error relative to the squared output under its Hessian, after solving. energy: of each
    matrix, the mean squared output of its expert, over tokens that it saw, with their routing
    weights; 1 for linears.
    """

    target: str
    layer: str
    group: str
    tokens: list[int]
    errors: list[list[float]]
    energy: list[float]

    def weights(self, average: float) -> Float[ndarray, " E"]:
        """How much the error of each matrix counts. An expert counts by an upper bound of the
        tokens that it will see: what it saw, two standard deviations of that count, and a share of
        the group's `average` for other text. One that saw few is therefore not crushed on a
        guess."""
        tokens = np.asarray(self.tokens, float)
        bound = tokens + DEVIATIONS * np.sqrt(tokens + 1) + OTHER_TEXT * average
        weights: ndarray = bound * np.asarray(self.energy)
        return weights


@dataclass(frozen=True)
class Measurements:
    """about: what they were measured on, by name. kl: by group, nats per token."""

    about: dict[str, str]
    parts: list[Measured]
    kl: dict[str, float]

    def costs(self) -> dict[str, Float[ndarray, "E C"]]:
        """By target, what each matrix adds to the KL of the model's output in each of its
        ways (ways.py)."""
        seen: dict[str, list[int]] = {}
        for part in self.parts:
            seen.setdefault(part.group, []).extend(part.tokens)
        shares, total, probe = {}, dict.fromkeys(seen, 0.0), BITS.index(PROBE)
        for part in self.parts:
            weights = part.weights(float(np.mean(seen[part.group])))
            shares[part.target] = weights[:, None] * np.asarray(part.errors)
            total[part.group] += shares[part.target][:, probe].sum()
        return {
            part.target: shares[part.target] * (self.kl[part.group] / (total[part.group] or 1.0))
            for part in self.parts
        }

    def check(self, about: dict[str, str], where: Path) -> None:
        """Raises ConfigError if they are of something else."""
        differing = [key for key, value in about.items() if self.about.get(key) != value]
        if differing:
            changes = "; ".join(f"{k} was {self.about.get(k)}, is {about[k]}" for k in differing)
            raise ConfigError(
                f"{where}: these measurements are of another run ({changes[:500]}); repeat that, "
                "or name another folder with --measurements"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, folder: Path) -> "Measurements":
        """Raises CheckpointError for a folder that does not hold them whole."""
        found = read_json(folder / FILE)
        try:
            parts = [Measured(**part) for part in found["parts"]]
            made = cls(dict(found["about"]), parts, {k: float(v) for k, v in found["kl"].items()})
            costs = made.costs()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _damaged(folder, f"{type(error).__name__}: {error}") from error
        for part in parts:
            cost = costs[part.target]
            if cost.shape not in _shapes(len(part.tokens)) or not np.isfinite(cost).all():
                raise _damaged(folder, f"{part.target} has no numbers for each matrix")
        return made


def _shapes(matrices: int) -> list[tuple[int, int]]:
    """What costs may have: some schemes have half of the ways."""
    return [(matrices, COUNT), (matrices, len(BITS))]


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{folder / FILE}: damaged ({what}); remove {folder}, and the command measures again"
    )
