"""Routed experts that do not fit on the GPU: slots for each layer, filled by calibration counts."""

from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoint.folders import read_json
from qmoe.errors import ConfigError
from qmoe.model.structure import Structure
from qmoe.system.sizes import format_size


def offload_experts(
    model: Any, structure: Structure, device: torch.device, expert_memory: int, folder: Path
) -> None:
    """Give every layer's experts as many slots on `device` as fit in expert_memory bytes together.

    The experts must have been loaded into host memory. If all fit, they are simply moved. Slots are
    filled with the experts that saw most calibration tokens, if the folder's report knows. Raises
    ConfigError if a layer would get fewer slots than a token chooses experts.
    """
    from qmoe.kernels.hosted.slots import SlotStack

    names = [name for layer in structure.layers for name in layer.experts]
    modules = {name: model.get_submodule(name) for name in names}
    largest = {
        name: max(length for _, length in m.qmoe_arena.arena.ranges())
        for name, m in modules.items()
    }
    if sum(m.qmoe_arena.nbytes() for m in modules.values()) <= expert_memory:
        for module in modules.values():
            module.qmoe_arena.to(device)
        return
    slots = expert_memory // sum(largest.values())
    least = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    if slots < least:
        need = least * sum(largest.values())
        raise ConfigError(
            f"expert_memory: {format_size(expert_memory)} hold {slots} experts of each layer, a "
            f"token chooses {least}; give {need} bytes or more"
        )
    counts = calibration_counts(folder)
    previous: SlotStack | None = None
    for name, module in modules.items():
        stack = SlotStack(module.qmoe_arena, slots, device)
        del module.qmoe_arena
        module.qmoe_arena = stack
        if previous is not None:
            previous.link(stack)
        stack.warm(counts.get(name, [0.0] * len(stack.ranges)))
        previous = stack


def calibration_counts(folder: Path) -> dict[str, list[float]]:
    """Calibration tokens of each expert, by the name of their module; none for plain rounding."""
    path = folder / "qmoe_report.json"
    report = read_json(path) if path.is_file() else {"layers": []}
    return {
        name: entry["tokens"]
        for layer in report["layers"]
        for name, entry in layer.get("experts", {}).items()
        if "tokens" in entry
    }
