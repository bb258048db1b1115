"""Settings: what to do to a model. A key, type or combination that cannot work is an error."""

from qmoe.config.quant import (
    PRESETS,
    CalibrationConfig,
    Method,
    QuantConfig,
    Rotate,
    Target,
    check_preset,
    setting_names,
)
from qmoe.config.scheme import BITS, CHANNEL, GROUPS, UNQUANTIZED, Scheme, expect
from qmoe.config.tables import overlay

__all__ = [
    "BITS",
    "CHANNEL",
    "GROUPS",
    "PRESETS",
    "UNQUANTIZED",
    "CalibrationConfig",
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
