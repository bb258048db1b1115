"""AWQ's scales folded into a decoder layer: into the norm before a group of readers, and between
an expert's up and down projections. Nothing is left to do at run time.

What reads a norm (model/norm_readers.py) must share one scale. A fold that changes the layer's
output (a norm that computes 1 + w, a gate that clamps, a reader that was not seen) is undone and
reported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qmoe.calibration.stats import ExpertStats, LayerStats
from qmoe.config import Scheme
from qmoe.layer.at_hand import LayerAtHand, LayerSettings, QuantizedLayer
from qmoe.layer.output_error import relative_rms
from qmoe.model.experts import bias, expert_weights, packed_parameters, rows, up_rows
from qmoe.model.layerwise import Call
from qmoe.model.norm_readers import NormReaders, columns, find_norm_readers, with_weights
from qmoe.solvers.awq import Reader, awq_scales

TOLERANCE = 1e-3  # relative RMS change of the layer's output that float32 rounding may explain


def fold(
    layer: LayerAtHand,
    settings: LayerSettings,
    names: list[str],
    stats: LayerStats,
    calls: list[Call],
    made: QuantizedLayer,
) -> None:
    """Fold AWQ's scales wherever the readers are all among `names` and the layer's output on
    `calls` stays as it is."""
    plain, not_folded = list(layer.run(calls)), made.record.not_folded

    def keep_if_equal(undo: Callable[[], None], what: str, changed: set[str]) -> None:
        # Not below the tolerance also where it is no number.
        if not relative_rms(list(layer.run(calls)), plain) <= TOLERANCE:
            undo()
            not_folded.append(what)
        else:
            made.changed |= changed

    packed = packed_parameters(layer.experts | layer.linears)
    modules = with_weights(layer.module, layer.name)
    for found in find_norm_readers(modules, lambda: list(layer.run(calls[:1]))):
        quantized = {r for r in found.readers if r in layer.schemes}
        if not quantized & set(names):
            continue
        if quantized <= set(names):
            undo, changed = fold_norm(layer, found, stats, settings.scale_dtype)
            keep_if_equal(undo, found.norm, changed - packed)
        elif found.norm not in not_folded:
            # Attention and experts that read one norm are solved at different times.
            not_folded.append(found.norm)
    for name in (n for n in names if n in layer.experts and layer.experts[n].has_gate):
        module = layer.experts[name]
        undo = fold_experts(module, stats.experts[name], layer.schemes[name], settings.scale_dtype)
        first = f"{name}.{expert_weights(module)[0]}_bias"
        keep_if_equal(undo, f"{name} (up to down)", {first} if module.has_bias else set())


def fold_norm(
    layer: LayerAtHand, found: NormReaders, stats: LayerStats, scale_dtype: torch.dtype
) -> tuple[Callable[[], None], set[str]]:
    """Scale the readers' columns up and the norm down, the Hessians with them.

    Returns the undo and the names of the parameters that changed.
    """
    readers = []
    hessians: dict[int, Tensor] = {}
    for name in found.readers:
        if name not in layer.schemes:
            continue  # a router takes the scale but is not quantized
        weight = columns(layer.submodule(name))
        hessian = _input_hessian(stats, name)
        hessians[id(hessian)] = hessian
        assert weight is not None
        there = _stacked(hessian).to(weight.device)
        readers.append(Reader(_stacked(weight), there, layer.schemes[name]))
    s = awq_scales(readers, scale_dtype=scale_dtype, shared=True)[0]
    norm = layer.submodule(found.norm)
    weights = [w for n in found.readers if (w := columns(layer.submodule(n))) is not None]
    vectors = list(norm.parameters(recurse=False))
    undo = _apply(
        [(w, s) for w in weights]
        + [(v, 1 / s) for v in vectors]
        + [(h, 1 / (s[:, None] * s)) for h in hessians.values()]
    )
    scaled = {id(p) for p in [*weights, *vectors]}
    named = layer.module.named_parameters(prefix=layer.name)
    return undo, {name for name, p in named if id(p) in scaled}


def fold_experts(
    experts: Any, stats: ExpertStats, scheme: Scheme, scale_dtype: torch.dtype
) -> Callable[[], None]:
    """Per expert: scale the columns of down up and the rows of up down; returns the undo."""
    name, second = expert_weights(experts)
    first, down = rows(experts, name), rows(experts, second)
    reader = Reader(down, stats.second.to(down.device), scheme)
    s = awq_scales([reader], scale_dtype=scale_dtype, shared=False)
    changes = [
        (down, s[:, None]),
        (up_rows(experts, first), 1 / s[:, :, None]),
        (stats.second, 1 / (s[:, :, None] * s[:, None])),
    ]
    biases = bias(experts, name)
    if biases is not None:
        changes.append((up_rows(experts, biases), 1 / s))
    return _apply(changes)


def _apply(changes: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    saved = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
    for tensor, factor in changes:
        tensor.data.mul_(factor.to(tensor.device))

    def undo() -> None:
        for tensor, before in saved:
            tensor.data.copy_(before)

    return undo


def _stacked(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor[None]


def _input_hessian(stats: LayerStats, name: str) -> Tensor:
    experts = stats.experts.get(name)
    return experts.first if experts is not None else stats.linears[name].hessian
