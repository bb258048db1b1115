"""What presets and targets change of the defaults, and the steps that a method has."""

from typing import Any

from qmoe.errors import ConfigError

# What each preset changes of the defaults. fast: GPTQ on min-max grids, without text that the model
# writes. best: more text of both kinds, each layer tuned, a wider search for codes.
PRESETS: dict[str, dict[str, Any]] = {
    "fast": {
        "search_grid": False,
        "refit": False,
        "calibration": {"samples": 128, "self_samples": 0},
    },
    "balanced": {},
    "best": {"tune": 200, "beam": 512, "calibration": {"samples": 128, "self_samples": 128}},
}
# What a target changes of the defaults, in from_dict and preset. llama.cpp: its smallest blocks
# have a scale for 32 inputs or fewer, so finer groups cost nothing there.
TARGETS: dict[str, dict[str, Any]] = {
    "llama.cpp": {
        "experts": {"group_size": 32, "gguf": True},
        "dense": {"bits": 8, "group_size": 32, "gguf": True},
    }
}
# Methods that a step is part of. A default of None is replaced by whether the method has the step.
STEPS: dict[str, tuple[str, ...]] = {
    "search_grid": ("gptq", "awq-gptq"),
    "refit": ("gptq",),
    "tune": ("gptq", "awq-gptq"),
    "distill": ("gptq", "awq", "awq-gptq"),
}


def check_preset(name: str, method: str) -> None:
    """Raises ConfigError for a preset that does not exist, or contradicts the method."""
    if name not in PRESETS:
        raise ConfigError(f"preset: expected one of {tuple(PRESETS)}, got {name!r}")
    if name != "fast" and method not in STEPS["tune"]:
        raise ConfigError(
            f"preset: {name} is made of steps of GPTQ, the method is {method}; leave the preset "
            "out, take fast, or choose the method gptq or awq-gptq"
        )
