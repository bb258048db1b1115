"""What is written, integers on grids or EXL3's codes, and which settings go with it."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from qmoe.config.scheme import CHANNEL, Scheme
from qmoe.errors import ConfigError

Format = Literal["compressed-tensors", "exl3"]
# What the format exl3 has where nothing else is said.
CODED = Scheme(4, CHANNEL, codebook="mul1")
DENSE_CODED = Scheme(6, CHANNEL, codebook="mul1")
# What EXL3's codes can be solved with. Distilling and the grid search know integers, and a rotation
# is part of the codes.
WITH_CODES = {
    "method": ("gptq", "rtn"),
    "rotate": ("off",),
    "distill": (0,),
    "search_grid": (False,),
}


def check_format(settings: Mapping[str, Any], schemes: Sequence[Scheme]) -> None:
    """Raises ConfigError unless the schemes and all other settings go with the format."""
    name = settings["format"]
    if name not in get_args(Format):
        raise ConfigError(f"format: expected one of {get_args(Format)}, got {name!r}")
    coded = name == "exl3"
    if any(bool(scheme.codebook) != coded for scheme in schemes):
        raise ConfigError(
            f"format: {name} needs schemes {'with' if coded else 'without'} a codebook; "
            "QuantConfig.preset and QuantConfig.from_dict make them from the format"
        )
    for key, values in WITH_CODES.items():
        if coded and settings[key] not in values:
            raise ConfigError(
                f"{key}: EXL3's codes are solved with {values[0]!r}, got {settings[key]!r}"
            )
