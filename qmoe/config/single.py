"""The settings of single matrices and modules: tables by their names in the model."""

from collections.abc import Mapping
from typing import Any

from qmoe.config.scheme import BITS, CHANNEL, GROUPS, expect
from qmoe.errors import ConfigError


def check_widths(widths: Any) -> None:
    """Raises ConfigError unless these are digits by name."""
    expect("widths", widths, dict)
    for name, digits in widths.items():
        if not isinstance(digits, str) or not digits or set(digits) - set(map(str, BITS)):
            raise ConfigError(
                f"widths: expected a digit of {BITS} for each matrix of {name}, got "
                f"{str(digits)[:100]!r}"
            )


def check_groups(groups: Mapping[str, Any]) -> None:
    """Raises ConfigError unless these are group sizes by name."""
    expect("groups", groups, dict)
    for name, size in groups.items():
        expect(f"groups: {name}", size, int)
        if size not in (*GROUPS, CHANNEL):
            raise ConfigError(
                f"groups: expected one of {GROUPS} or {CHANNEL} (one scale per output channel) "
                f"for {name}, got {size}"
            )
