"""The QuantConfig that a command line describes: preset, config file, options and `--set`."""

import argparse
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qmoe.calibration.text import merged
from qmoe.config import (
    PRESETS,
    UNQUANTIZED,
    QuantConfig,
    check_preset,
    overlay,
    setting_names,
)
from qmoe.errors import ConfigError


def config_from(args: argparse.Namespace) -> QuantConfig:
    """The settings of a `quantize` command: of the preset, the config file, options and `--set`,
    of which later ones win. Raises ConfigError for settings that contradict each other."""
    values = given(args)
    text = values.get("calibration")
    if args.statistics and text:
        named = f"calibration.{next(iter(text))}" if isinstance(text, dict) else "calibration"
        raise ConfigError(f"{named}: with --statistics no text is run; leave out one of the two")
    if args.preset is not None:
        check_preset(args.preset, values.get("method", QuantConfig.method))
        values = overlay(PRESETS[args.preset], values)
    return QuantConfig.from_dict(values)


def given(args: argparse.Namespace) -> dict[str, Any]:
    """What the config file, options and `--set` say, as nested tables, without defaults."""
    layers = [_options(args), *map(assignment, args.set)]
    if args.config is not None:
        layers.insert(0, read_settings(Path(args.config)))
    return overlay(*layers)


def as_options(args: argparse.Namespace, but: Sequence[str]) -> list[str]:
    """The options that give `quantize` the same settings, without those named in `but`."""
    out = [] if args.config is None else ["--config", str(args.config)]
    for name in setting_names():
        if name not in but and (value := getattr(args, name, None)) is not None:
            out += ["--set", f"{name}={_toml(value)}"]
    return out + [part for text in args.set for part in ("--set", text)]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options that stand for settings, as nested tables."""
    given = {n: v for n in setting_names() if (v := getattr(args, n, None)) is not None}
    if "calibration.text" in given:
        given["calibration.text"] = merged(given["calibration.text"])
    return overlay(*(_nested(name, value) for name, value in given.items()))


def _nested(name: str, value: Any) -> dict[str, Any]:
    for part in reversed(name.split(".")):
        value = {part: value}
    return dict(value)


def assignment(text: str) -> dict[str, Any]:
    """`experts.bits=3` as a nested table. A value is one of TOML (3, 0.5, true, "words", a list);
    what is none, as in `method=awq`, is a string."""
    name, equals, value = text.partition("=")
    name, value = name.strip(), value.strip()
    if not equals or not name or not value:
        raise ConfigError(f"--set {text!r}: expected NAME=VALUE, as in --set experts.bits=3")
    try:
        read = tomllib.loads(f"value = {value}")
    except tomllib.TOMLDecodeError:
        read = {"value": value}
    if list(read) != ["value"]:
        raise ConfigError(f"--set {name}: expected one value, got {value!r}")
    return _nested(name, read["value"])


def read_settings(path: Path) -> dict[str, Any]:
    """The tables of a config file. Raises ConfigError if it cannot be read, or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: the config file cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: the config file is not TOML: {error}") from error


def to_toml(config: dict[str, Any]) -> str:
    """Settings, as a report has them, as a config file."""
    lines, tables = [], []
    for name, value in config.items():
        if name in ("widths", "groups"):
            if value:
                tables += ["", f"[{name}]", *(f"{_toml(k)} = {_toml(v)}" for k, v in value.items())]
        elif isinstance(value, dict):
            tables += ["", f"[{name}]", *(f"{key} = {_toml(v)}" for key, v in value.items())]
        elif value is None:
            tables += ["", f"[{name}]", f"bits = {UNQUANTIZED}"]
        else:
            lines.append(f"{name} = {_toml(value)}")
    return "\n".join([*lines, *tables])


def _toml(value: Any) -> str:
    """A JSON value in TOML: numbers, true, false and lists are the same in both, and so are strings
    but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
