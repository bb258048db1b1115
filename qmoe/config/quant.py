"""What to do to a model: frozen dataclasses, checked when they are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, cast, get_args

from qmoe.config.formats import CODED, DENSE_CODED, Format, check_format
from qmoe.config.presets import PRESETS, STEPS, TARGETS, check_preset
from qmoe.config.scheme import CHANNEL, UNQUANTIZED, Scheme, expect
from qmoe.config.single import check_groups, check_widths
from qmoe.config.tables import check_keys, overlay, strict
from qmoe.errors import ConfigError

Method = Literal["rtn", "gptq", "awq", "awq-gptq"]
Rotate = Literal["off", "fused", "online"]
Target = Literal["qmoe", "vllm", "sglang", "llama.cpp"]
Mtp = Literal["quantize", "keep"]
# Targets that take one scheme for all experts of a layer.
UNIFORM_LAYERS = ("vllm", "sglang")


DENSE = Scheme(8, CHANNEL)
BY_METHOD: Any = None


@dataclass(frozen=True)
class CalibrationConfig:
    """Which text the statistics are gathered on.

    text: "bundled" (all domains that ship with qmoe), "bundled:austen+factbook", a local file,
    table or folder, or `hf:NAME[/CONFIG][:SPLIT[:COLUMN]]` for any `datasets` name
    (calibration/text.py); several in one string with commas between them, or in a list. samples x
    seqlen tokens are used, spread evenly over the domains. batch: samples per forward pass.
    seed: of the choice of samples, and of what the model writes. self_samples: samples more that
    the model writes itself (pipeline/self_text.py), in the languages and domains it knows, whatever
    the text is; 0 leaves them out.
    """

    text: str | Sequence[str] = "bundled"
    samples: int = 64
    seqlen: int = 256
    batch: int = 8
    seed: int = 0
    self_samples: int = 64

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
    """Everything `qmoe.quantize` can be told. The defaults are the preset "balanced".

    method: how experts and dense linears are rounded. "gptq" (the default) uses second-order
        statistics of the calibration text. "awq" scales channels by their activations and rounds
        to nearest. "awq-gptq" scales as AWQ does and then solves by GPTQ. "rtn" rounds to nearest
        and uses no text.
    experts: the routed experts' scheme.
    dense: the scheme of attention, shared experts and dense MLPs; None leaves them in 16 bits.
    lm_head: the scheme of the output projection; None leaves it in 16 bits.
    act_order: GPTQ visits columns by falling Hessian diagonal, with group scales fixed from the
        original weights, so nothing extra is stored.
    damp: the share of the mean Hessian diagonal that is added to the diagonal.
    routing_weighted: each routed token's contribution to its expert's Hessian is weighted by the
        square of its routing weight.
    search_grid: grids and integers are searched that GPTQ's one pass on min-max grids leaves out
        (solvers/search.py). By default it is on where the method ends in GPTQ.
    refit: matrices behind quantized ones are fitted to the inputs that those give
        (solvers/refit.py). By default it is on with the method "gptq", and no other method has it.
        Runs that save or reuse statistics leave it out, because it needs text between matrices.
    tune: steps of tuning each layer against the original's output after it is solved
        (qmoe/layer/tune.py); 0 is none.
    distill: steps of distilling the finished model, its scales, norms and biases, against
        the original's predictions (qmoe/pipeline/distill.py); 0 is none.
    rotate: a Hadamard rotation of what quantized weights read. "online" rotates all of it, in the
        largest blocks that fit, which is work at run time (qmoe/format/hadamard.py). "fused"
        rotates the residual stream alone, which is no work, as all weights around it are rotated
        too and a tied head is untied; models for which that is not the same function are refused
        (qmoe/rotation/find_rotation.py). Neither goes with AWQ.
    format: what is written: integers in "compressed-tensors", or trellis codes in "exl3"
        (qmoe/format/exl3.py).
    beam: how many ways to continue the search for EXL3's codes follows at each weight
        (kernels/cpu/encode.py); 256 by default, and 512 for the preset "best".
    min_tokens: an expert with fewer calibration tokens borrows tokens of its layer (see
        calibration/coverage.py).
    widths: bits of single matrices, where they are not those of `experts` or `dense`: a digit (2,
        3, 4 or 8) for each, by module for a linear and by parameter for the experts of a layer, as
        in {"model.layers.0.mlp.experts.down_proj": "2242..."}. Gate and up of an expert have one
        digit, since kernels multiply with both at once.
    groups: group sizes of single modules, where they are not those of `experts` or `dense`: 32, 64,
        128, or -1 for one scale per output channel, by the name of a linear or of the experts of a
        layer, as in {"model.layers.0.mlp.experts": -1}.
    target: what is to run the result. Settings that break a rule of that engine (qmoe/engines)
        are refused. "vllm" and "sglang" take one scheme for all experts of a layer, and
        "llama.cpp" has other defaults (TARGETS), which `from_dict` and `preset` know. Where the
        experts of a model differ, a result for "qmoe" has a format name that other loaders refuse:
        transformers decodes all experts by one scheme, and gives wrong weights without an error.
    mtp: what becomes of a layer that predicts tokens beyond the next (prediction/names.py):
        "quantize" has it quantized like all others, "keep" leaves it in 16 bits.
    calibration: the text that statistics are gathered on.
    """

    method: Method = "gptq"
    experts: Scheme = Scheme()
    dense: Scheme | None = DENSE
    lm_head: Scheme | None = None
    act_order: bool = True
    damp: float = 0.01
    routing_weighted: bool = True
    search_grid: bool = BY_METHOD
    refit: bool = BY_METHOD
    tune: int = 0
    distill: int = 0
    rotate: Rotate = "off"
    format: Format = "compressed-tensors"
    beam: int = 256
    min_tokens: int = 256
    widths: Mapping[str, str] = field(default_factory=dict, hash=False)
    groups: Mapping[str, int] = field(default_factory=dict, hash=False)
    target: Target = "qmoe"
    mtp: Mtp = "quantize"
    calibration: CalibrationConfig = CalibrationConfig()

    def __post_init__(self) -> None:
        for name in ("experts", "dense", "lm_head"):
            value = getattr(self, name)
            if not isinstance(value, Scheme) and (value is not None or name == "experts"):
                raise ConfigError(f"{name}: expected a Scheme or its table, got {value!r}")
        if not isinstance(self.calibration, CalibrationConfig):
            raise ConfigError(
                f"calibration: expected a CalibrationConfig or its table, got {self.calibration!r}"
            )
        if self.method not in get_args(Method):
            raise ConfigError(f"method: expected one of {get_args(Method)}, got {self.method!r}")
        for name in ("search_grid", "refit"):
            if getattr(self, name) is None:
                has = self.method in STEPS[name] and (self.format != "exl3" or name == "refit")
                object.__setattr__(self, name, has)
        for name in ("act_order", "routing_weighted", "search_grid", "refit"):
            expect(name, getattr(self, name), bool)
        for name in ("min_tokens", "tune", "distill", "beam"):
            expect(name, getattr(self, name), int)
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if self.beam < 1:
            raise ConfigError(f"beam: expected 1 or more, got {self.beam}")
        expect("damp", self.damp, float)
        for name, methods in STEPS.items():
            if getattr(self, name) and self.method not in methods:
                raise ConfigError(
                    f"{name}: is a step of the method {' or '.join(methods)}, the method is "
                    f"{self.method}; leave {name} out, switch it off, or choose such a method"
                )
        for name, choices in (("rotate", Rotate), ("target", Target), ("mtp", Mtp)):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name}: expected one of {get_args(choices)}, got {getattr(self, name)!r}"
                )
        if len({scheme.rotation for scheme in self._schemes()}) > 1:
            raise ConfigError("rotation: expected the same block in all schemes")
        if self.rotate == "fused" and any(s.rotation for s in self._schemes()):
            raise ConfigError("rotate: a scheme that is rotated is online, not fused")
        if self.applies_awq and (self.rotate != "off" or any(s.rotation for s in self._schemes())):
            raise ConfigError(f"rotate: not with AWQ's scales, the method is {self.method}")
        check_widths(self.widths)
        check_groups(self.groups)
        for name in ("widths", "groups"):
            if getattr(self, name) and self.applies_awq:
                raise ConfigError(
                    f"{name}: not with AWQ's scales, which experts share; the method is "
                    f"{self.method}"
                )
        check_format(vars(self), self._schemes())
        if not 0 < self.damp < 1:
            raise ConfigError(f"damp: expected a share between 0 and 1, got {self.damp}")

    @property
    def applies_awq(self) -> bool:
        """Whether AWQ's scales are folded into the layer before it is rounded."""
        return self.method.startswith("awq")

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "QuantConfig":
        """The settings of "fast", "balanced" (which `QuantConfig()` is) or "best", with `changes`
        to fields of this class or of CalibrationConfig. Raises ConfigError for a preset whose steps
        the method does not have: "rtn" and "awq" go with "fast", or with no preset."""
        check_preset(name, changes.get("method", "gptq"))
        text = {f.name: changes.pop(f.name) for f in fields(CalibrationConfig) if f.name in changes}
        return cls.from_dict(overlay(PRESETS[name], {"calibration": text}, changes))

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

    def scheme_of(self, module: str, base: Scheme) -> Scheme:
        """Of a linear by its module's name, or of an experts module but for its experts' bits.
        base: what it has unless `widths` and `groups` say otherwise."""
        found = replace(base, group_size=self.groups.get(module, base.group_size))
        return replace(found, bits=int(self.widths[module])) if module in self.widths else found

    def _schemes(self) -> list[Scheme]:
        found = (self.experts, self.dense, self.lm_head)
        return [scheme for scheme in found if scheme is not None]

    def rotated_by(self, block: int) -> "QuantConfig":
        """The same with this block in every scheme."""
        schemes = {name: getattr(self, name) for name in ("experts", "dense", "lm_head")}
        return replace(
            self, **{n: replace(s, rotation=block) for n, s in schemes.items() if s is not None}
        )

    def rounded_to_nearest(self) -> "QuantConfig":
        """The same schemes and rotation with the method that needs no text."""
        return replace(self, method="rtn", search_grid=False, refit=False, tune=0, distill=0)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "QuantConfig":
        """The inverse of `to_dict`. Keys that are left out have their target's defaults; those of
        `lm_head` are then the ones of `dense`. Tables of `dense` and `lm_head` with 16 bits leave
        these in 16 bits. Raises ConfigError on a key it does not know, naming the nearest."""
        expect("config", values, dict)
        values = overlay(TARGETS.get(str(values.get("target")), {}), values)
        dense = values.get("dense")
        dense = asdict(dense) if isinstance(dense, Scheme) else dense
        like = dense if isinstance(dense, dict) else {}
        coded = values.get("format") == "exl3"
        defaults = {
            "experts": asdict(CODED if coded else Scheme()),
            "dense": asdict(DENSE_CODED if coded else DENSE),
        }
        if coded:
            values = {"experts": {}, "dense": {}} | values
        defaults["lm_head"] = defaults["dense"] | like | {"bits": UNQUANTIZED}
        for name, default in defaults.items():
            if isinstance(values.get(name), dict):
                values[name] = _scheme(name, values[name], default)
        if isinstance(values.get("calibration"), dict):
            values["calibration"] = strict(
                CalibrationConfig, values["calibration"], "calibration.", setting_names()
            )
        return cast(QuantConfig, strict(cls, values, "", setting_names()))


def _scheme(name: str, values: dict[str, Any], default: dict[str, Any]) -> Scheme | None:
    check_keys(Scheme, values, f"{name}.", setting_names())
    whole = default | values
    if whole["bits"] != UNQUANTIZED or name == "experts":
        return Scheme(**whole)
    if "bits" not in values and values:
        raise ConfigError(f"{name}: it stays in 16 bits unless {name}.bits says 2, 3, 4 or 8")
    return None


def setting_names() -> list[str]:
    """Every setting by its dotted name, as in `experts.bits`."""
    tables = dict.fromkeys(("experts", "dense", "lm_head"), Scheme)
    classes: dict[str, type] = {**tables, "calibration": CalibrationConfig}
    return [
        f"{f.name}.{inner.name}" if inner is not None else f.name
        for f in fields(QuantConfig)
        for inner in (fields(classes[f.name]) if f.name in classes else (None,))
    ]
