"""What to do to a model: frozen dataclasses, checked when they are made, strict when read back."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from qmoe.errors import ConfigError

Method = Literal["rtn", "gptq", "awq", "awq-gptq"]
Rotate = Literal["off", "fused", "online"]
BITS = (2, 3, 4, 8)
GROUPS = (32, 64, 128)
CHANNEL = -1


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix is stored.

    bits: 2, 3, 4 or 8. group_size: input features that share a scale, 32, 64 or 128, or -1 for one
    scale per output channel. symmetric: without zero points. Only symmetric weights can be loaded
    by plain transformers and by vLLM's Marlin kernels; asymmetric ones lose less and run in qmoe.
    rotation: 0, or the block of a Hadamard rotation that is in the stored weights and that inputs
    go through at run time (qmoe/format/hadamard.py); such weights run in qmoe only.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    rotation: int = 0

    def __post_init__(self) -> None:
        expect("bits", self.bits, int)
        expect("group size", self.group_size, int)
        expect("symmetric", self.symmetric, bool)
        expect("rotation", self.rotation, int)
        if self.rotation < 0 or self.rotation & (self.rotation - 1):
            raise ConfigError(f"rotation: expected 0 or a power of two, got {self.rotation}")
        if self.bits not in BITS:
            raise ConfigError(f"bits: expected one of {BITS}, got {self.bits}")
        if self.group_size not in (*GROUPS, CHANNEL):
            raise ConfigError(
                f"group size: expected one of {GROUPS} or {CHANNEL} (one scale per output "
                f"channel), got {self.group_size}"
            )

    def groups(self, in_features: int) -> int:
        """Number of groups G along an input dimension of `in_features`, which must divide."""
        return 1 if self.group_size == CHANNEL else in_features // self.group_size

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight, scale and zero point included."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group * self.groups(in_features) / in_features

    def __str__(self) -> str:
        group = "channel" if self.group_size == CHANNEL else f"g{self.group_size}"
        rotated = f" rotated by {self.rotation}" if self.rotation else ""
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}{rotated}"


# What quality may cost. fast: GPTQ on min-max grids. balanced: better grids and integers, and half
# of the text written by the model itself. best: more of both kinds of text, and each layer tuned.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {"search_grid": False, "refit": False, "tune": 0, "samples": 128, "self_samples": 0},
    "balanced": {"search_grid": True, "refit": True, "tune": 0, "samples": 64, "self_samples": 64},
    "best": {"search_grid": True, "refit": True, "tune": 200, "samples": 128, "self_samples": 128},
}


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text the statistics are gathered on.

    text: "bundled" (all domains that ship with qmoe), "bundled:austen+factbook", a local file,
    table or folder, or "hf:NAME[/CONFIG][:SPLIT[:COLUMN]]" for any `datasets` name
    (calibration/text.py); several in one string with commas between them, or in a list. samples x
    seqlen tokens are used, spread evenly over the domains. batch: samples per forward pass.
    self_samples: samples more that the model writes itself (pipeline/self_text.py), in the
    languages and domains it knows, whatever the text is.
    """

    text: str | Sequence[str] = "bundled"
    samples: int = 128
    seqlen: int = 256
    batch: int = 8
    seed: int = 0
    self_samples: int = 0

    def __post_init__(self) -> None:
        expect("calibration text", self.text, str, list, tuple)
        if not isinstance(self.text, str):
            for part in self.text:
                expect("calibration text", part, str)
            object.__setattr__(self, "text", tuple(self.text))  # nobody changes it later
        if not self.text:
            raise ConfigError("calibration text: expected at least one, got none")
        expect("calibration seed", self.seed, int)
        for name, least in (("samples", 1), ("self_samples", 0), ("seqlen", 2), ("batch", 1)):
            expect(f"calibration {name}", getattr(self, name), int)
            if getattr(self, name) < least:
                raise ConfigError(
                    f"calibration {name}: expected at least {least}, got {getattr(self, name)}"
                )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"calibration seed: expected 0 to 2^63 - 1, got {self.seed}")


@dataclass(frozen=True)
class QuantConfig:
    """Everything `qmoe.quantize` can be told.

    method: how experts and dense linears are rounded; awq-gptq folds AWQ's scales and then solves
        by GPTQ.
    experts: the routed experts' scheme.
    dense: of attention, shared experts and dense MLPs; None leaves them in 16 bits.
    lm_head: of the output projection; None leaves it in 16 bits.
    act_order: GPTQ visits columns by falling Hessian diagonal, with group scales fixed from the
        original weights, so nothing extra is stored.
    damp: share of the mean Hessian diagonal that is added to the diagonal.
    routing_weighted: weigh each routed token's contribution to its expert's Hessian by the square
        of its routing weight.
    search_grid: search grids and integers that GPTQ's one pass on min-max grids leaves out
        (solvers/search.py).
    refit: fit matrices behind quantized ones to what those give (solvers/refit.py). Statistics
        from files or for files leave it out, since it takes text in between.
    tune: steps of tuning each layer against the original's output after it is solved
        (qmoe/layer/tune.py); 0 is none.
    rotate: a Hadamard rotation of what quantized weights read. "online" rotates all of it, in the
        largest blocks that fit, which is work at run time (qmoe/format/hadamard.py). "fused"
        rotates the residual stream alone, which is no work, as all weights around it are rotated
        too and a tied head is untied; models for which that is not the same function are refused
        (qmoe/pipeline/find_rotation.py). Neither goes with AWQ.
    min_tokens: an expert with fewer calibration tokens borrows tokens of its layer (see
        calibration/coverage.py).
    """

    method: Method = "gptq"
    experts: Scheme = field(default_factory=Scheme)
    dense: Scheme | None = field(default_factory=lambda: Scheme(8, CHANNEL, True))
    lm_head: Scheme | None = None
    act_order: bool = True
    damp: float = 0.01
    routing_weighted: bool = True
    search_grid: bool = True
    refit: bool = True
    tune: int = 0
    rotate: Rotate = "off"
    min_tokens: int = 256
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        for name in ("experts", "dense", "lm_head"):
            value = getattr(self, name)
            if not isinstance(value, Scheme) and (value is not None or name == "experts"):
                raise ConfigError(f"{name}: expected a Scheme, got {value!r}")
        if not isinstance(self.calibration, CalibrationConfig):
            raise ConfigError(f"calibration: expected its config, got {self.calibration!r}")
        if self.method not in get_args(Method):
            raise ConfigError(f"method: expected one of {get_args(Method)}, got {self.method!r}")
        for name in ("act_order", "routing_weighted", "search_grid", "refit"):
            expect(name, getattr(self, name), bool)
        for name in ("min_tokens", "tune"):
            expect(name, getattr(self, name), int)
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        expect("damp", self.damp, float)
        if self.tune and not self.method.endswith("gptq"):
            raise ConfigError(f"tune: starts from gptq's weights, the method is {self.method}")
        if self.rotate not in get_args(Rotate):
            raise ConfigError(f"rotate: expected one of {get_args(Rotate)}, got {self.rotate!r}")
        if len({scheme.rotation for scheme in self._schemes()}) > 1:
            raise ConfigError("rotation: expected the same block in all schemes")
        if self.rotate == "fused" and any(s.rotation for s in self._schemes()):
            raise ConfigError("rotate: a scheme that is rotated is online, not fused")
        if self.applies_awq and (self.rotate != "off" or any(s.rotation for s in self._schemes())):
            raise ConfigError(f"rotate: not with AWQ's scales, the method is {self.method}")
        if not 0 < self.damp < 1:
            raise ConfigError(f"damp: expected a share between 0 and 1, got {self.damp}")

    @property
    def applies_awq(self) -> bool:
        """Whether AWQ's scales are folded into the layer before it is rounded."""
        return self.method.startswith("awq")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "QuantConfig":
        """The settings of "fast", "balanced" (the command's default) or "best", with `changes` to
        fields of this class or of CalibrationConfig."""
        if name not in PRESETS:
            raise ConfigError(f"preset: expected one of {tuple(PRESETS)}, got {name!r}")
        values = PRESETS[name] | changes
        text = {f.name: values.pop(f.name) for f in fields(CalibrationConfig) if f.name in values}
        return cast(QuantConfig, _strict(cls, {"calibration": CalibrationConfig(**text)} | values))

    @property
    def symmetric(self) -> bool:
        """Whether nothing has zero points."""
        return all(scheme.symmetric for scheme in self._schemes())

    @property
    def rotated(self) -> bool:
        """Whether weights are stored so that inputs have to be rotated at run time."""
        return self.rotate == "online" or any(scheme.rotation for scheme in self._schemes())

    @property
    def experts_in_float32(self) -> bool:
        """Whether routed experts are in memory in float32: those that change before they are
        rounded must not be rounded twice."""
        return self.applies_awq or self.rotate == "fused"

    def _schemes(self) -> list[Scheme]:
        found = (self.experts, self.dense, self.lm_head)
        return [scheme for scheme in found if scheme is not None]

    def rotated_by(self, block: int) -> "QuantConfig":
        """The same with this block in every scheme."""
        schemes = {name: getattr(self, name) for name in ("experts", "dense", "lm_head")}
        return replace(
            self, **{n: replace(s, rotation=block) for n, s in schemes.items() if s is not None}
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantConfig":
        """The inverse of `to_dict`; raises ConfigError on a key it does not know."""
        expect("config", values, dict)
        values = dict(values)
        for name in ("experts", "dense", "lm_head"):
            if isinstance(values.get(name), dict):
                values[name] = _strict(Scheme, values[name])
        if isinstance(values.get("calibration"), dict):
            values["calibration"] = _strict(CalibrationConfig, values["calibration"])
        return cast(QuantConfig, _strict(cls, values))


def expect(name: str, value: Any, *kinds: type) -> None:
    """Raises ConfigError unless `value` is one of `kinds`; True and False are no numbers."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{name}: expected {wanted}, got {repr(value)[:200]}")


def _strict(cls: type, values: dict[str, Any]) -> Any:
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise ConfigError(f"{cls.__name__}: unknown key {unknown[0]!r}; known keys are {known}")
    return cls(**values)
