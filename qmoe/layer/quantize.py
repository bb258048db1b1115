"""Quantizing one decoder layer that is in memory.

Afterwards the layer holds the dequantized weights, so that the layers behind it see what they will
see at run time.
"""

from collections.abc import Callable
from typing import Any

import torch

from qmoe.calibration.coverage import average_weight
from qmoe.calibration.moments import Inputs, keeping_inputs
from qmoe.calibration.stats import LayerStats
from qmoe.errors import CalibrationError
from qmoe.layer import unfused
from qmoe.layer.at_hand import LayerAtHand, LayerSettings, QuantizedLayer
from qmoe.layer.awq import fold
from qmoe.layer.output_error import output_error
from qmoe.layer.records import ExpertsRecord, LayerRecord
from qmoe.layer.refit import refit_linears, steps
from qmoe.layer.solve import borrow_rare, solve_modules
from qmoe.layer.statistics import CollectedStats, collect_statistics
from qmoe.layer.tune import tune_and_record, tuning_targets
from qmoe.model.experts import expert_weights, stack
from qmoe.model.layerwise import Call
from qmoe.system import distributed


def quantize_layer(
    layer: LayerAtHand,
    settings: LayerSettings,
    calls: list[Call],
    originals: list[Call],
    save: Callable[[LayerStats], None] | None = None,
) -> tuple[QuantizedLayer, list[Any]]:
    """Quantize everything in the layer on text; returns the result and the layer's outputs: for
    `originals` those of the original layer, then for `calls` those with quantized weights (of the
    last layer, some).

    calls: the layer's inputs in the quantized model, one for each batch. originals: those of the
    same batches in the original model, for a layer that is to be tuned. save: is given the
    statistics of all matrices.
    """
    made = QuantizedLayer(LayerRecord(layer.name, unquantized=layer.structure.unquantized))
    targets = tuning_targets(layer, settings, originals)
    attention, block = _stages(layer)

    refitted = {n: layer.linears[n] for n in attention} if settings.refits else {}
    with keeping_inputs(refitted, settings.scratch) as inputs:
        stats, before = collect_statistics(
            layer, settings, attention, calls, keep=not targets.outputs
        )
    reference = targets.outputs or before
    _solve_stage(layer, settings, attention, stats, calls, inputs, made)

    # The experts, on inputs that come from quantized attention.
    more, before = collect_statistics(layer, settings, block, calls, keep=not reference)
    reference = reference or before or [None] * len(calls)
    stats.add(more)
    if save is not None:
        save(stats)
    _solve_stage(layer, settings, block, stats, calls, Inputs(), made)

    if settings.config.tune:
        tune_and_record(layer, settings, calls, targets, made)

    outputs: list[Any] = [None] * len(calls)
    for i, call in enumerate(calls):
        if reference[i] is not None or not layer.is_last:
            [output] = layer.run([call])
            outputs[i] = settings.scratch.keep(output)
    made.record.error = output_error(layer.name, outputs, reference)
    return made, targets.outputs + outputs


def solve_layer(layer: LayerAtHand, settings: LayerSettings, given: LayerStats) -> QuantizedLayer:
    """Quantize everything in the layer on statistics that are known: saved ones, or none at all for
    plain rounding. CalibrationError if those of the experts are missing or of another size."""
    made = QuantizedLayer(LayerRecord(layer.name, unquantized=layer.structure.unquantized))
    if settings.config.method != "rtn":
        _check_given(layer, given)
    stats = CollectedStats(**vars(given))
    for names in _stages(layer):
        _solve_stage(layer, settings, names, stats, [], Inputs(), made)
    return made


def _stages(layer: LayerAtHand) -> tuple[list[str], list[str]]:
    """What is solved first, attention and dense MLPs, and what then, the block with the experts."""
    names = layer.structure
    attention = [n for n in names.dense if n not in names.in_block]
    block = [*names.experts, *names.unfused_linears(), *names.in_block]
    return [n for n in attention if n in layer.schemes], [n for n in block if n in layer.schemes]


def _solve_stage(
    layer: LayerAtHand,
    settings: LayerSettings,
    names: list[str],
    stats: CollectedStats,
    calls: list[Call],
    inputs: Inputs,
    made: QuantizedLayer,
) -> None:
    """Quantize the modules `names`. Linears whose inputs were kept are solved one behind the other,
    each fitted to what those before it give once they are quantized."""
    config = settings.config
    made.record.experts |= unfused.borrow(layer, names, stats, config.min_tokens)
    if config.applies_awq:
        for name in (n for n in names if n in layer.experts):
            part = stats.experts[name]
            average = average_weight(part)
            rare = borrow_rare(layer.experts[name], part, average, config.min_tokens)
            made.record.experts[name] = ExpertsRecord(borrowed=rare)
        fold(layer, settings, names, stats, calls, made)
    # Ranks without a batch do as the others do.
    owners = next((o for o in distributed.all_gather_object(inputs.owners) if o), {})
    for owner, step in steps(names, owners):
        if owner:
            before = inputs.tensors.pop(owner, [])
            fitted = refit_linears(layer, settings, step, calls, before)
            stats.linears |= dict.fromkeys(step, fitted)
        solve_modules(layer, settings, step, stats, made)


def _check_given(layer: LayerAtHand, given: LayerStats) -> None:
    for name, module in layer.experts.items():
        weights = [stack(module, w) for w in expert_weights(module)]
        stats = given.experts.get(name)
        found = None if stats is None else (stats.first.shape, stats.second.shape)
        wanted = tuple(torch.Size((len(w), w.shape[2], w.shape[2])) for w in weights)
        if found != wanted:
            raise CalibrationError(
                f"{name}: the saved statistics have {found}, expected {wanted}; save them again"
            )
