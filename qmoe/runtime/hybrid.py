"""Routed experts on the GPU and on the CPU at once: which ones lie where."""

from dataclasses import replace
from typing import Any

from qmoe.errors import ConfigError
from qmoe.kernels.cpu.stack import uses_cpu_kernels
from qmoe.kernels.hosted.placement import hottest
from qmoe.model.source import Source
from qmoe.plan.in_memory import expert_sizes
from qmoe.plan.sizes import Stack
from qmoe.runtime.offload import calibration_counts
from qmoe.runtime.run_on import RunOn
from qmoe.runtime.stored import Declared
from qmoe.system.devices import CPU
from qmoe.system.sizes import format_size


def place_experts(source: Source, run: RunOn, memory: int) -> RunOn:
    """Choose the experts that lie in `memory` bytes of the GPU, slots included: those that saw most
    calibration tokens for their bytes, if the folder's report knows, in one ranking over all
    layers. All stay on the GPU if they fit.

    source: an opened folder whose experts are declared. Raises ConfigError if the memory does not
    hold the slots, or the CPU's kernels are not installed.
    """
    from qmoe.kernels.hosted.hybrid import AT_ONCE, How, Staging

    sizes = {
        name: _expert_bytes(source.model.get_submodule(name), name, layer.name)
        for layer in source.structure.layers
        for name in layer.experts
    }
    if sum(map(sum, sizes.values())) <= memory:
        return run
    largest = max(map(max, sizes.values()))
    room = memory - 2 * AT_ONCE * largest
    if room < 0:
        raise ConfigError(
            f"expert_memory: {format_size(memory)} do not hold the slots through which experts in "
            f"host memory are copied; give {2 * AT_ONCE * largest} bytes or more"
        )
    if not uses_cpu_kernels(CPU):
        raise ConfigError(
            "plan: experts in host memory are computed by the CPU's kernels, which are not "
            "installed; build them (README.md), or give expert_memory instead of the plan"
        )
    known = calibration_counts(source.folder.path)
    counts = {name: known.get(name, [0.0] * len(each)) for name, each in sizes.items()}
    how = How(Staging(run.device, largest), run.exact)
    return replace(run, hot=hottest(counts, sizes, room), how=how)


def _expert_bytes(module: Any, name: str, layer: str) -> list[int]:
    """Bytes of each expert in the layout of the GPU's kernels."""
    declared: dict[str, Declared] = module._qmoe_stored
    parts = []
    for weight, d in declared.items():
        E, N, K = d.shape
        parts.append(Stack(f"{name}.{weight}", layer, (E, N, K), d.parts, d.scheme, True, d.widths))
    return expert_sizes(parts, next(iter(declared.values())).dtype)


def measure_rates(model: Any) -> None:
    """Find out what copying an expert costs here, and computing it on the CPU, by trying both with
    the first layer that has experts in host memory."""
    from qmoe.kernels.hosted.hybrid import HybridStack, measured_rates

    for stack in model.modules():
        if isinstance(stack, HybridStack) and stack.cold:
            hidden, device = stack.cold[0].matrices[0].k, stack.how.staging.buffer.device
            nbytes = max(length for _, length in stack.ranges)
            stack.how.staging.rates = measured_rates(device, stack.beside[0], hidden, nbytes)
            return
