"""AWQ's scales folded into a decoder layer: into the norm before a group of readers, and between
an expert's up and down projections. Nothing is left to do at run time.

What reads a norm (model/norm_readers.py) must share one scale. A fold that changes the layer's
output (a norm that computes 1 + w, a gate that clamps, a reader that was not seen) is undone and
reported.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calibration.stats import ExpertStats, LayerStats
from qmoe.config import Scheme
from qmoe.model.experts import bias, expert_weights, rows, up_rows
from qmoe.model.norm_readers import Fold, columns
from qmoe.solvers.awq import Reader, awq_scales

TOLERANCE = 1e-3  # relative RMS change of the layer's output that float32 rounding may explain


def fold_norm(
    model: nn.Module,
    fold: Fold,
    stats: LayerStats,
    schemes: dict[str, Scheme],
    scale_dtype: torch.dtype,
) -> tuple[Callable[[], None], set[str]]:
    """Scale the readers' columns up and the norm down, the Hessians with them.

    Returns the undo and the names of the parameters that changed.
    """
    readers = []
    hessians: dict[int, Tensor] = {}
    for name in fold.readers:
        if name not in schemes:
            continue  # a router takes the scale but is not quantized
        weight = columns(model.get_submodule(name))
        hessian = _input_hessian(stats, name)
        hessians[id(hessian)] = hessian
        assert weight is not None
        there = _stacked(hessian).to(weight.device)
        readers.append(Reader(_stacked(weight), there, schemes[name]))
    s = awq_scales(readers, scale_dtype=scale_dtype, shared=True)[0]
    norm = model.get_submodule(fold.norm)
    weights = [w for n in fold.readers if (w := columns(model.get_submodule(n))) is not None]
    vectors = list(norm.parameters(recurse=False))
    undo = _apply(
        [(w, s) for w in weights]
        + [(v, 1 / s) for v in vectors]
        + [(h, 1 / (s[:, None] * s)) for h in hessians.values()]
    )
    scaled = {id(p) for p in [*weights, *vectors]}
    return undo, {name for name, p in model.named_parameters() if id(p) in scaled}


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
    kept = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
    for tensor, factor in changes:
        tensor.data.mul_(factor.to(tensor.device))

    def undo() -> None:
        for tensor, before in kept:
            tensor.data.copy_(before)

    return undo


def _stacked(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 3 else tensor[None]


def _input_hessian(stats: LayerStats, name: str) -> Tensor:
    experts = stats.experts.get(name)
    return experts.first if experts is not None else stats.linears[name].hessian
