"""Sizes in bytes: read from what a person writes, and printed. Units are decimal as on a data sheet
(1 GB is 10^9 bytes) or binary (1 GiB is 2^30)."""

import re

from qmoe.errors import ConfigError

UNITS = {"b": 1} | {
    f"{letter}{binary}b": base**power
    for power, letter in enumerate("kmgt", 1)
    for binary, base in (("", 1000), ("i", 1024))
}
SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) *([a-z]+)?", re.IGNORECASE)
LEAST = 10**6  # bytes that a number without a unit stands for


def parse_size(name: str, value: str | int) -> int:
    """The bytes that a size stands for: an int is bytes, a string a number with a unit ("12GB",
    "1.5 GiB", "500MB") or bytes ("12000000000").

    name: of the setting, for errors. Raises ConfigError for anything else, and for a string of few
    bytes without a unit: the command line once took such numbers as GB.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f'{name}: expected a size such as "12GB", or bytes, got {value!r:.200}')
    if isinstance(value, int):
        return value
    found = SIZE.fullmatch(value.strip())
    number, unit = found.groups() if found else ("", None)
    if not number or (unit or "b").lower() not in UNITS or (unit is None and "." in number):
        raise ConfigError(
            f"{name}: expected a size such as 12GB (10^9 bytes each), 12GiB (2^30) or 500MB, got "
            f"{value!r:.200}"
        )
    if unit is None and int(number) < LEAST:
        raise ConfigError(
            f"{name}: {number} has no unit; write {number}GB for so many times 10^9 bytes, or "
            f"{number}B for so many bytes"
        )
    return int(float(number) * UNITS[unit.lower()]) if unit else int(number)


def format_size(count: float) -> str:
    """Bytes in the decimal unit that reads best, as in "3.82 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
