"""How much memory quantizing a model takes, found before the work from sizes alone.

Counted: the largest layer as it is loaded and solved, what lies outside the layers, the Hessians of
a few experts with the solver's workspace, and the activations of all calibration text. Only the
last can wait on disk (system/spill.py), and with it the integers of layers that are distilled.
`scripts/bench_quantize.py` prints what a run really took.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from qmoe.config import QuantConfig
from qmoe.errors import ConfigError
from qmoe.model import experts
from qmoe.model.schemes import weight_shapes
from qmoe.model.source import Source, schemes_of
from qmoe.model.structure import Layer
from qmoe.solvers.solve import experts_at_once
from qmoe.system import distributed
from qmoe.system.host_memory import PROCESS, room
from qmoe.system.sizes import format_size

TUNING = (
    22  # bytes per weight: the original, a latent value, its gradient, two of Adam's, the weight
)
DISTILLING = (
    4  # bytes per weight of a layer: its matrices as numbers; their gradients are short-lived
)
SCALE = 24  # bytes per scale that is distilled: a factor, gradient, two of Adam's, best, stored
LOGITS = 8  # times the logits of a batch in float32: the original's, ours, logarithms, gradients
CONTEXT = 1_000_000_000  # CUDA itself, and the activations of one batch
WORKSPACE = 8  # times the Hessians solved at once


@dataclass(frozen=True)
class Need:
    """Bytes. activations: of one rank, what may wait on disk; fixed: all else."""

    fixed: int
    activations: int


def needed(source: Source, config: QuantConfig, tokens: int, all_hessians: bool = False) -> Need:
    """What quantizing takes in a process. tokens: of calibration text, of all ranks. all_hessians:
    whether those of all experts of a layer are there at once, as AWQ always has them."""
    widest = 4 if config.experts_in_float32 else torch.finfo(source.weight_dtype()).bits // 8
    layers = sum(map(_elements, source.stages()))
    resident = 4 * (_elements(source.model) - layers)
    if source.adds_lm_head(config):
        resident += 4 * _elements(source.model.get_input_embeddings())
    layer = max(_layer_bytes(source, layer, widest) for layer in source.structure.layers)
    if all_hessians or config.applies_awq:
        layer += max(_hessian_bytes(source, layer) for layer in source.structure.layers)
    if config.tune:
        layer += TUNING * max(map(_elements, source.stages()))
    hidden = source.model.config.get_text_config().hidden_size
    # A layer's inputs, its outputs before and after, and what its experts received, which all ranks
    # have of all text.
    streams = 2 if config.tune else 1
    activations = 4 * hidden * (3 * streams * tokens // distributed.count() + tokens)
    if config.refit and config.method == "gptq" and not all_hessians:
        # What dense linears got, in bfloat16; more than is kept, as those at the front are not.
        activations += (
            2
            * max(map(partial(_dense_inputs, source), source.structure.layers))
            * (tokens // distributed.count())
        )
    need = Need(PROCESS + resident + layer + _solver_bytes(source, config), activations)
    return _with_distilling(source, config, tokens, need) if config.distill else need


def _with_distilling(source: Source, config: QuantConfig, tokens: int, need: Need) -> Need:
    """What distilling takes, which comes after all layers are solved, or what that took if it is
    more. Integers of all layers, what comes out of the original's last layer, and the inputs of all
    layers for one batch may wait on disk."""
    layers = source.structure.layers
    sizes = [_elements(stage) for stage in source.stages()]
    text = source.model.config.get_text_config()
    batch = config.calibration.batch * config.calibration.seqlen
    outside = 4 * (_elements(source.model) - sum(sizes))
    scales = sum(_scales(source, layer, config) for layer in layers)
    logits = 4 * LOGITS * batch * text.vocab_size
    if config.lm_head is not None:
        outside += 2 * DISTILLING * text.hidden_size * text.vocab_size
    fixed = PROCESS + outside + DISTILLING * max(sizes) + SCALE * scales + logits
    waits = sum(sizes) + 4 * text.hidden_size * (tokens + batch * len(layers))
    return Need(max(need.fixed, fixed), max(need.activations, waits))


def _scales(source: Source, layer: Layer, config: QuantConfig) -> int:
    return sum(
        math.prod(shape[:-1]) * scheme.groups(shape[-1])
        for name, scheme in schemes_of(source, layer, config).items()
        for _, shape in weight_shapes(source.model, name)
    )


def spills(need: Need, allowed: int | None) -> bool:
    """Whether activations have to wait on disk. allowed: bytes for one process, or None for what is
    free. Raises ConfigError if the rest does not fit."""
    there = room()
    limit = there.nbytes // distributed.count() if allowed is None else allowed
    if need.fixed > limit:
        found = f"are free {there.reason}" if allowed is None else "are allowed"
        more = "; set max_memory to try it all the same" if allowed is None else ""
        raise ConfigError(
            f"memory: quantizing this model needs about {format_size(need.fixed)}, and "
            f"{format_size(limit)} {found}{more}"
        )
    return need.fixed + need.activations > limit


def check_fits(source: Source, config: QuantConfig, device: torch.device) -> None:
    """Raises ConfigError if a layer, its solver and a batch do not fit on a GPU."""
    if device.type != "cuda":
        return
    need, found = on_device(source, config), torch.cuda.mem_get_info(device)[0]
    if need > found:
        raise ConfigError(
            f"device: quantizing this model takes about {format_size(need)} on it, and "
            f"{format_size(found)} are free on {device}; use the CPU"
            f"{', or --tune 0' if config.tune else ''}"
        )


def on_device(source: Source, config: QuantConfig) -> int:
    """Bytes that quantizing takes on a GPU, with CUDA itself: a layer, its solver and a batch."""
    widest = 4 if config.experts_in_float32 else torch.finfo(source.weight_dtype()).bits // 8
    need = max(_layer_bytes(source, layer, widest) for layer in source.structure.layers)
    if config.applies_awq:
        need += max(_hessian_bytes(source, layer) for layer in source.structure.layers)
    if config.tune:
        need += TUNING * max(map(_elements, source.stages()))
    if config.distill:  # integers beside them
        need = max(need, (DISTILLING + 1) * max(map(_elements, source.stages())))
    return need + CONTEXT + _solver_bytes(source, config)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _layer_bytes(source: Source, layer: Layer, widest: int) -> int:
    """A layer in memory, its largest stack a second time while it is loaded, and the integers of
    all its experts, joined and packed."""
    every = _elements(source.model.get_submodule(layer.name))
    stacks = [0]
    for name in layer.experts:
        module = source.model.get_submodule(name)
        stacks += [experts.rows(module, w).numel() for w in experts.expert_weights(module)]
    loading = widest * max(stacks)
    solved = 2 * sum(stacks)
    return widest * sum(stacks) + 4 * (every - sum(stacks)) + max(loading, solved)


def _dense_inputs(source: Source, layer: Layer) -> int:
    """Features that dense linears outside the MoE block take in, together."""
    outside = [n for n in layer.dense if n not in layer.in_block]
    return sum(source.model.get_submodule(n).in_features for n in outside)


def _hessian_bytes(source: Source, layer: Layer) -> int:
    """All Hessians of a layer's routed experts."""
    modules = [source.model.get_submodule(name) for name in layer.experts]
    shapes = [experts.rows(m, w).shape for m in modules for w in experts.expert_weights(m)]
    return sum(4 * E * K**2 for E, _, K in shapes)


def _solver_bytes(source: Source, config: QuantConfig) -> int:
    most = 0
    for layer in source.structure.layers:
        for name in layer.experts:
            module = source.model.get_submodule(name)
            shapes = [experts.rows(module, w).shape for w in experts.expert_weights(module)]
            for E, _, K in shapes:
                most = max(most, min(E, experts_at_once(K)) * K**2)
        for name in [*layer.dense, *layer.unfused_linears()]:
            most = max(most, source.model.get_submodule(name).in_features ** 2)
    return 0 if config.method == "rtn" else 4 * WORKSPACE * most
