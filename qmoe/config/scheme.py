"""How one weight matrix is stored, and the check of a setting's type."""

from dataclasses import dataclass
from typing import Any

from qmoe.errors import ConfigError

BITS = (2, 3, 4, 8)
CODEBOOKS = ("mul1", "mcg", "3inst")  # of EXL3
RATES = tuple(half / 2 for half in range(2, 17))  # bits a weight that its codes can take
GROUPS = (32, 64, 128)
CHANNEL = -1
UNQUANTIZED = 16  # bits of a matrix that is left as it is


@dataclass(frozen=True)
class Scheme:
    """How one weight matrix is stored.

    bits: 2, 3, 4 or 8. group_size: input features that share a scale, 32, 64 or 128, or -1 for one
    scale per output channel. symmetric: without zero points. Only symmetric weights can be loaded
    by plain transformers and by vLLM's Marlin kernels; asymmetric ones lose less and run in qmoe.
    rotation: 0, or the block of a Hadamard rotation that is in the stored weights and that inputs
    go through at run time (qmoe/format/hadamard.py); such weights run in qmoe only.
    gguf: scales are those that llama.cpp's smallest block types hold, so that `qmoe export` writes
    2 and 3 bits as Q2_K and Q3_K (qmoe/format/gguf_scales.py).
    codebook: "" for integers on a grid, or that of EXL3's trellis codes (qmoe/format/exl3.py): bits
    are then 1 to 8 in halves, and scales are one for each input and each output.
    """

    bits: Any = 4  # an int, and of EXL3's codes also the half of one
    group_size: int = 128
    symmetric: bool = True
    rotation: int = 0
    gguf: bool = False
    codebook: str = ""

    def __post_init__(self) -> None:
        expect("bits", self.bits, int, *([float] if self.codebook else []))
        expect("group size", self.group_size, int)
        expect("symmetric", self.symmetric, bool)
        expect("rotation", self.rotation, int)
        expect("gguf", self.gguf, bool)
        if self.codebook:
            self._check_codes()
            return
        if self.rotation < 0 or self.rotation & (self.rotation - 1):
            raise ConfigError(f"rotation: expected 0 or a power of two, got {self.rotation}")
        if self.bits not in BITS:
            raise ConfigError(f"bits: expected one of {BITS}, got {self.bits}")
        if self.group_size not in (*GROUPS, CHANNEL):
            raise ConfigError(
                f"group size: expected one of {GROUPS} or {CHANNEL} (one scale per output "
                f"channel), got {self.group_size}"
            )

    def _check_codes(self) -> None:
        if self.codebook not in CODEBOOKS:
            raise ConfigError(f"codebook: expected one of {CODEBOOKS}, got {self.codebook!r}")
        if self.bits not in RATES:
            raise ConfigError(f"bits: expected 1 to 8 in halves for EXL3, got {self.bits}")
        if self.bits % 1 and self.codebook != "mul1":
            raise ConfigError(f"bits: {self.bits} needs the codebook mul1, got {self.codebook}")
        if (self.group_size, self.symmetric, self.rotation) != (CHANNEL, True, 0):
            raise ConfigError(
                "group size, symmetric, rotation: EXL3's codes have none of these; leave them out"
            )

    def groups(self, in_features: int) -> int:
        """Number of groups G along an input dimension of `in_features`, which must divide."""
        return 1 if self.group_size == CHANNEL else in_features // self.group_size

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight, scale and zero point included."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return float(self.bits) + per_group * self.groups(in_features) / in_features

    def __str__(self) -> str:
        if self.codebook:
            return f"exl3 {self.bits:g} {self.codebook}"
        group = "channel" if self.group_size == CHANNEL else f"g{self.group_size}"
        rotated = f" rotated by {self.rotation}" if self.rotation else ""
        return f"int{self.bits} {group} {'sym' if self.symmetric else 'asym'}{rotated}"


def expect(name: str, value: Any, *kinds: type) -> None:
    """Raises ConfigError unless `value` is one of `kinds`; True and False are no numbers."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join("None" if k is type(None) else k.__name__ for k in kinds)
        raise ConfigError(f"{name}: expected {wanted}, got {repr(value)[:200]}")
