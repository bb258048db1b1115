"""Settings as the arguments of a `qmoe quantize` that gives the same."""

import json
from dataclasses import asdict
from typing import Any

from qmoe.config.presets import PRESETS, STEPS
from qmoe.config.quant import QuantConfig, setting_names
from qmoe.config.scheme import UNQUANTIZED
from qmoe.config.tables import overlay


def arguments(config: QuantConfig) -> list[str]:
    """The preset that is nearest, the method, and `--set` for every setting that these leave
    different. The arguments are not quoted for a shell."""
    short = [] if config.method == "gptq" else ["--method", config.method]
    names = [name for name in PRESETS if name == "fast" or config.method in STEPS["tune"]]
    tried = [([], {}), *((["--preset", name], PRESETS[name]) for name in names)]
    found = []
    for given, table in tried:
        base = QuantConfig.from_dict(overlay(table, {"method": config.method}))
        found.append([*given, *short, *_changes(config, base)])
    return min(found, key=len)


def _changes(config: QuantConfig, base: QuantConfig) -> list[str]:
    ours, theirs = _flat(config), _flat(base)
    out = []
    for name in setting_names():
        if name in ours and ours[name] != theirs.get(name):
            out += ["--set", f"{name}={json.dumps(ours[name], ensure_ascii=False)}"]
    return out


def _flat(config: QuantConfig) -> dict[str, Any]:
    """Settings by their dotted names. The block of an online rotation follows from the model."""
    found: dict[str, Any] = {}
    for name, value in asdict(config).items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            found |= {f"{name}.bits": UNQUANTIZED} if value is None else {name: value}
    if config.rotate == "online":
        return {name: value for name, value in found.items() if not name.endswith(".rotation")}
    return found
