"""AWQ's scales folded into a decoder layer: into the norm before a group of readers, and between
an expert's up and down projections. Nothing is left to do at run time.

Who reads a norm's output is observed while the layer runs, not known per model: every module with
weights whose input is the norm's output. In an MoE that is the router, all experts and the shared
expert together, which must share one scale. A fold that changes the layer's output (a norm that
computes 1 + w, a gate that clamps, a reader that was not seen) is undone and reported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qmoe.calibration.stats import ExpertStats, LayerStats
from qmoe.config import Scheme
from qmoe.experts import bias, expert_weights, is_experts, rows, up_rows
from qmoe.solvers.awq import Reader, awq_scales

TOLERANCE = 1e-3  # relative RMS change of the layer's output that float32 rounding may explain


@dataclass(frozen=True)
class Fold:
    """A norm and every module that reads its output, by name."""

    norm: str
    readers: list[str]


def find_folds(layer: nn.Module, prefix: str, run: Callable[[], Any]) -> list[Fold]:
    """Norms of the layer whose readers all take a scale per input feature."""
    modules = {
        f"{prefix}.{n}": m
        for n, m in layer.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    }
    wrote: dict[tuple[int, int], str] = {}
    read: dict[str, list[str]] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def before(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                writer = wrote.get((args[0].data_ptr(), args[0].numel()))
                if writer is not None:
                    read.setdefault(writer, []).append(name)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                alive.append(output)
                wrote[(output.data_ptr(), output.numel())] = name

        return hook

    handles = [m.register_forward_pre_hook(before(n)) for n, m in modules.items()]
    handles += [m.register_forward_hook(after(n)) for n, m in modules.items()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [Fold(norm, readers) for norm, readers in read.items() if _fits(modules, norm, readers)]


def _fits(modules: dict[str, nn.Module], norm: str, readers: list[str]) -> bool:
    """A norm has vectors only, and every reader one matrix with as many columns."""
    vectors = list(modules[norm].parameters(recurse=False))
    if any(v.dim() != 1 for v in vectors) or getattr(modules[norm], "weight", None) is None:
        return False
    columns = [_columns(modules[r]) for r in readers]
    return all(c is not None and c.shape[-1] == len(vectors[0]) for c in columns)


def _columns(module: nn.Module) -> Tensor | None:
    """The weight [.., K] of a module whose input features can be scaled."""
    if is_experts(module):
        return rows(module, expert_weights(module)[0])
    matrices = [p for p in module.parameters(recurse=False) if p.dim() == 2]
    return matrices[0] if len(matrices) == 1 else None


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
        weight = _columns(model.get_submodule(name))
        hessian = _input_hessian(stats, name)
        hessians[id(hessian)] = hessian
        assert weight is not None
        there = _stacked(hessian).to(weight.device)
        readers.append(Reader(_stacked(weight), there, schemes[name]))
    s = awq_scales(readers, scale_dtype=scale_dtype, shared=True)[0]
    norm = model.get_submodule(fold.norm)
    weights = [w for n in fold.readers if (w := _columns(model.get_submodule(n))) is not None]
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
