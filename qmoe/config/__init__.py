"""Settings: what to do to a model. A key, type or combination that cannot work is an error."""

from qmoe.config.cache import Kv
from qmoe.config.formats import Format
from qmoe.config.presets import PRESETS, check_preset
from qmoe.config.quant import (
    UNIFORM_LAYERS,
    CalibrationConfig,
    Method,
    QuantConfig,
    Rotate,
    Target,
    setting_names,
)
from qmoe.config.scheme import BITS, CHANNEL, GROUPS, RATES, UNQUANTIZED, Scheme, expect
from qmoe.config.tables import overlay

__all__ = [
    "BITS",
    "CHANNEL",
    "GROUPS",
    "PRESETS",
    "RATES",
    "UNIFORM_LAYERS",
    "UNQUANTIZED",
    "CalibrationConfig",
    "Format",
    "Kv",
    "Method",
    "QuantConfig",
    "Rotate",
    "Scheme",
    "Target",
    "check_preset",
    "expect",
    "overlay",
    "setting_names",
]
