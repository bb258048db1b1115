"""What a folder holds, or is going to hold, as the rules of engines look at it: the form and the
shape of every packed matrix. No weights are read."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

EXPERT = re.compile(r"^(.*\bexperts)\.(?:expert_)?(\d+)\.(\w+)$")
# Linears that engines put into one: their names, in order.
JOINED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
# What a linear is called whose inputs, or whose outputs, tensor parallelism divides.
BY_INPUT = ("o_proj", "out_proj", "down_proj", "w2")
BY_OUTPUT = (
    "q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj", "w1", "w3",
)  # fmt: skip
DOWN = ("down_proj", "w2")


@dataclass(frozen=True)
class Form:
    """How a matrix is stored. bits: of an integer. group: inputs that share a scale, or -1 for one
    scale per output. symmetric: without zero points."""

    bits: int
    group: int
    symmetric: bool

    def __str__(self) -> str:
        group = "channel-wise" if self.group == -1 else f"groups of {self.group}"
        return f"{self.bits} bits, {group}, {'symmetric' if self.symmetric else 'zero points'}"


@dataclass(frozen=True)
class Matrix:
    """A packed matrix. name: of its module in the checkpoint. outputs, inputs: N and K."""

    name: str
    outputs: int
    inputs: int
    form: Form

    @property
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def experts(self) -> str | None:
        """The module that the expert belongs to; None for a matrix of no routed expert."""
        found = EXPERT.match(self.name)
        return found[1] if found else None

    @property
    def expert(self) -> int:
        found = EXPERT.match(self.name)
        return int(found[2]) if found else 0

    def share(self, tp: int) -> tuple[int, int]:
        """Outputs and inputs on one of `tp` devices, rounded up where they do not divide."""
        n, k = self.outputs, self.inputs
        by_input, by_output = self.last in BY_INPUT, self.last in BY_OUTPUT
        return (math.ceil(n / tp) if by_output else n), (math.ceil(k / tp) if by_input else k)


@dataclass(frozen=True)
class Contents:
    """config: config.json. method, format: of its quantization_config; formats: of its groups.
    matrices: all that are packed. unpacked: modules of linears that are not, by name."""

    config: dict[str, Any]
    method: str
    format: str
    matrices: Sequence[Matrix]
    formats: Sequence[str] = ()
    unpacked: Sequence[str] = ()

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type"))

    def text(self, name: str) -> Any:
        """An entry of the config, of its text part if it has one; None if it is not there."""
        inner = self.config.get("text_config")
        return (inner if isinstance(inner, dict) else self.config).get(name)

    def layers(self) -> dict[str, list[Matrix]]:
        """The matrices of routed experts, by experts module."""
        found: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            if matrix.experts is not None:
                found.setdefault(matrix.experts, []).append(matrix)
        return found

    def linears(self) -> list[Matrix]:
        """The matrices of no routed expert."""
        return [matrix for matrix in self.matrices if matrix.experts is None]

    def joined(self) -> Iterator[tuple[list[Matrix], list[str]]]:
        """Linears as engines run them: those that become one together, all others alone; and the
        names of parts that are there but not packed."""
        linears = {matrix.name: matrix for matrix in self.linears()}
        unpacked, done = set(self.unpacked), set[str]()
        for name in linears:
            if name in done:
                continue
            owner, _, last = name.rpartition(".")
            group = next((g for g in JOINED if last in g), (last,))
            names = [f"{owner}.{part}" if owner else part for part in group]
            done |= set(names)
            yield [linears[n] for n in names if n in linears], [n for n in names if n in unpacked]
