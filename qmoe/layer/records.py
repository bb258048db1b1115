"""What was done to each matrix, expert and layer: kept with unfinished work, shown in the report.

Errors are relative: RMS of what rounding changed in the output over RMS of the output, on the
calibration tokens. In JSON whatever is empty or was not measured is left out.
"""

from dataclasses import dataclass, field
from typing import Any

from qmoe.solvers.solve import Solved


@dataclass
class MatrixRecord:
    """Of a linear, or of the matrices of a stack, by their place in it.

    error: of every matrix; empty where plain rounding measured nothing.
    damped: by matrix, the damping that its Hessian took where the usual was not enough.
    rounded: matrices rounded to nearest, for want of usable statistics.
    bounded: by matrix, how many rows have no scale near enough in `scale_dtype`.
    """

    error: list[float] = field(default_factory=list)
    damped: dict[int, float] = field(default_factory=dict)
    rounded: list[int] = field(default_factory=list)
    bounded: dict[int, int] = field(default_factory=dict)
    scale_dtype: str = ""

    @classmethod
    def of(cls, solved: Solved) -> "MatrixRecord":
        dtype = str(solved.quantized.scale.dtype).removeprefix("torch.")
        error = [round(e, 6) for e in solved.error]
        return cls(error, solved.damped, solved.rounded, solved.bounded, dtype)

    def to_json(self, linear: bool) -> dict[str, Any]:
        """linear: a linear's error is a number, that of a stack a list."""
        rows = {"dtype": self.scale_dtype, "rows": _with_text_keys(self.bounded)}
        return _without_empty(
            error=self.error[0] if linear and self.error else self.error,
            damped=_with_text_keys(self.damped),
            rounded=self.rounded,
            bounded=rows if self.bounded else {},
        )

    @classmethod
    def from_json(cls, value: Any) -> "MatrixRecord":
        error, bounded = value.get("error", []), value.get("bounded", {"rows": {}, "dtype": ""})
        return cls(
            [float(e) for e in (error if isinstance(error, list) else [error])],
            {int(e): float(amount) for e, amount in value.get("damped", {}).items()},
            [int(e) for e in value.get("rounded", [])],
            {int(e): int(count) for e, count in bounded["rows"].items()},
            str(bounded["dtype"]),
        )


@dataclass
class ExpertsRecord:
    """Of one experts module, or of a list of experts that are modules of their own.

    tokens: routed to each expert; routing_mass: the sum of their routing weights; borrowed: experts
    that saw too few and borrowed others'. None where no text ran, or where it is not known.
    matrices: by weight stack; those of experts that are modules are among the layer's linears.
    routing_kept: for a tuned layer, the share of the original's choices of experts that are made
        once it is "solved" and once it is "tuned".
    """

    tokens: list[int] | None = None
    routing_mass: list[float] | None = None
    borrowed: list[int] | None = None
    matrices: dict[str, MatrixRecord] = field(default_factory=dict)
    routing_kept: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        known = {
            "tokens": self.tokens,
            "routing_mass": self.routing_mass,
            "borrowed": self.borrowed,
        }
        return {
            **{key: value for key, value in known.items() if value is not None},
            **{weight: part.to_json(linear=False) for weight, part in self.matrices.items()},
            **_without_empty(routing_kept=self.routing_kept),
        }

    @classmethod
    def from_json(cls, value: Any) -> "ExpertsRecord":
        rest = dict(value)
        tokens, mass, borrowed = (rest.pop(k, None) for k in ("tokens", "routing_mass", "borrowed"))
        routing_kept = rest.pop("routing_kept", {})
        return cls(
            None if tokens is None else [int(n) for n in tokens],
            None if mass is None else [float(m) for m in mass],
            None if borrowed is None else [int(e) for e in borrowed],
            {weight: MatrixRecord.from_json(part) for weight, part in rest.items()},
            {when: float(share) for when, share in routing_kept.items()},
        )


@dataclass
class LayerRecord:
    """Of a decoder layer, or of the output projection.

    error: of the layer's output on the calibration text; None where no text ran.
    experts: by experts module. dense: by linear.
    unquantized: modules that stay in 16 bits, with the reason.
    not_folded: where AWQ's scales would have changed the output.
    tuning: the error of a tuned layer once it is "solved" and once it is "tuned".
    unreached: whether it was rounded to nearest, since no text reaches it.
    method: how it was solved, if not as the settings say.
    """

    name: str
    error: float | None = None
    experts: dict[str, ExpertsRecord] = field(default_factory=dict)
    dense: dict[str, MatrixRecord] = field(default_factory=dict)
    unquantized: dict[str, str] = field(default_factory=dict)
    not_folded: list[str] = field(default_factory=list)
    tuning: dict[str, float] = field(default_factory=dict)
    unreached: bool = False
    method: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "error": self.error,
            "experts": {name: record.to_json() for name, record in self.experts.items()},
            "dense": {name: record.to_json(linear=True) for name, record in self.dense.items()},
            "unquantized": self.unquantized,
            **_without_empty(
                not_folded=self.not_folded,
                tuning=self.tuning,
                unreached=self.unreached,
                method=self.method,
            ),
        }

    @classmethod
    def from_json(cls, value: Any) -> "LayerRecord":
        """Raises a LookupError, TypeError, ValueError or AttributeError for anything else than what
        `to_json` gives."""
        return cls(
            value.get("name", ""),
            value["error"],
            {name: ExpertsRecord.from_json(part) for name, part in value["experts"].items()},
            {name: MatrixRecord.from_json(part) for name, part in value["dense"].items()},
            value["unquantized"],
            value.get("not_folded", []),
            value.get("tuning", {}),
            value.get("unreached", False),
            value.get("method", ""),
        )


def _without_empty(**values: Any) -> dict[str, Any]:
    """An error of 0.0 is a number, and stays."""
    return {key: value for key, value in values.items() if value or isinstance(value, float)}


def _with_text_keys(values: dict[int, Any]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items()}
