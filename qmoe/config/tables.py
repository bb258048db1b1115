"""Nested tables of settings, as a TOML file has them: laid over each other, made into classes."""

from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from qmoe.errors import ConfigError


def overlay(*tables: dict[str, Any]) -> dict[str, Any]:
    """Nested tables of settings in one: later values win, tables are merged key by key."""
    out: dict[str, Any] = {}
    for table in tables:
        for key, value in table.items():
            both = isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = overlay(out[key], value) if both else value
    return out


def strict(cls: type, values: dict[str, Any], prefix: str, names: list[str]) -> Any:
    """A dataclass of a table that begins with `prefix`; see `check_keys`."""
    check_keys(cls, values, prefix, names)
    return cls(**values)


def check_keys(cls: type, values: dict[str, Any], prefix: str, names: list[str]) -> None:
    """Raises ConfigError if the table has a key that is no field of the dataclass. names: all
    settings by their dotted names, of which the message says the nearest."""
    own = {f.name: f"{prefix}{f.name}" for f in fields(cls)}
    for key in values:
        if key in own:
            continue
        # By the last part of a name, so that `samples` alone finds calibration.samples.
        known = {name.rpartition(".")[2]: name for name in reversed(names)} | own
        nearest = get_close_matches(str(key), known, 1)
        hint = f"the nearest is {known[nearest[0]]!r}" if nearest else f"known are {list(own)}"
        raise ConfigError(f"config: unknown key {prefix + str(key)!r}; {hint}")
