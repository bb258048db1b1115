"""One pass over a model's layers: each is loaded, quantized, given out to be written, and freed."""

import json
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import qmoe.calibration.stats as statistics
from qmoe.calibration.stats import LayerStats, LinearStats
from qmoe.checkpoint.prefetch import read_ahead
from qmoe.errors import UnsupportedModelError
from qmoe.format.stacks import digest
from qmoe.format.trellis import Stack
from qmoe.layer.at_hand import LayerAtHand, LayerSettings
from qmoe.layer.quantize import quantize_layer, solve_layer
from qmoe.model.experts import packed_parameters
from qmoe.model.layerwise import Call, Finished, Forward, Waiting, suspended
from qmoe.model.skeleton import inputs_of
from qmoe.model.source import schemes_of, widths_of
from qmoe.model.structure import Layer
from qmoe.pipeline.finish import unpacked
from qmoe.pipeline.lm_head import solve_lm_head
from qmoe.pipeline.output import OutputFolder, Shard
from qmoe.pipeline.plan import Plan
from qmoe.pipeline.self_text import CalibrationText
from qmoe.pipeline.shard import restore, round_unpacked, shard_tensors, stored_dtype
from qmoe.prediction.streamed import Seen, prediction_calls, seeing_last
from qmoe.solved.kept_matrices import KeptMatrices
from qmoe.system.devices import move_to
from qmoe.system.host_memory import return_freed
from qmoe.system.progress import progress
from qmoe.system.spill import Scratch


def load_outside(plan: Plan) -> set[str]:
    """Load what lies outside the layers, rotated if that is asked for; returns the parameters that
    the rotation changed and that are not to be packed."""
    source, lm_head = plan.source, plan.source.structure.lm_head
    source.weights.load(source.resident(), torch.float32)
    source.weights.tie()
    if plan.rotation is None:
        return set()
    packed = set() if plan.config.lm_head is None else {f"{lm_head}.weight"}
    return round_unpacked(source, plan.rotation.rotate_outside(source.model), packed)


def outside_layers(plan: Plan, changed: set[str], lm_head: LinearStats | None) -> Shard:
    """The last shard: what `load_outside` loaded. changed: what it returned. lm_head: what the
    output projection was given, if it is to be quantized."""
    quantized: dict[str, Stack] = {}
    record = None
    if lm_head is not None:
        made, record = solve_lm_head(plan, lm_head)
        quantized = {f"{plan.source.structure.lm_head}.weight": made}
    names = [*plan.source.resident(), *plan.source.weights.carried]
    tensors = shard_tensors(plan.source, names, quantized, changed)
    return Shard(plan.shards - 1, tensors, record, _digests(quantized))


def quantize_layers(plan: Plan, text: CalibrationText, out: OutputFolder) -> Iterator[Shard]:
    """Quantize every layer on what reaches it in the quantized model; yields the shard of each as
    soon as it is final, on the process that writes, but for those that `out` has already."""
    source, layers = plan.source, plan.source.structure.layers
    settings = layer_settings(plan, text, out)
    bar, reached = iter(progress(layers, "quantizing layers")), set[int]()
    with seeing_last(source, settings.scratch) as seen:
        for event in _passes(plan, text):
            if not isinstance(event, Waiting):
                continue  # a batch has run through
            i = event.index
            next(bar)
            reached.add(i)
            if source.prediction is not None:
                seen.check(layers[i].name, event.calls)
            if source.prediction is not None and layers[i].name == source.prediction.like:
                seen.keep_calls(event.calls)
            if i in out.finished:
                weights = unpacked(plan, i, out.read_shard(i))
                outputs = _run_again(plan, settings.scratch, event, weights)
            else:
                outputs = yield from _quantize(plan, settings, out, i, event.forward, event.calls)
            return_freed()  # or what one layer leaves in pieces adds up
            if not _is_last(plan, i):
                event.go_on(outputs)
    _check_reached(plan, reached)
    for i in (i for i in range(len(layers)) if i not in reached):
        next(bar)
        if i in out.finished:
            out.read_shard(i)
        else:
            forward = source.model.get_submodule(layers[i].name).forward
            calls = _predicting(plan, settings, text, seen) if _is_last(plan, i) else []
            yield from _quantize(plan, settings, out, i, forward, calls)
        return_freed()
    next(bar, None)  # lets the progress bar close


def _predicting(
    plan: Plan, settings: LayerSettings, text: CalibrationText, seen: Seen
) -> list[Call]:
    """What the last layer is given, if it is one that predicts tokens beyond the next."""
    if plan.source.prediction is None:
        return []
    batches = text.batches(plan.config.calibration)
    return prediction_calls(plan.source, seen, batches, settings.scratch)


def layer_settings(plan: Plan, text: CalibrationText, out: OutputFolder | None) -> LayerSettings:
    """What all layers of a run share. out: where activations wait and solved experts are kept, if
    anywhere."""
    config = plan.config
    return LayerSettings(
        config,
        tokens=text.samples.numel(),
        scale_dtype=plan.source.weight_dtype(),
        stored_dtype=partial(stored_dtype, plan.source),
        refits=plan.refits,
        needs_all_hessians=plan.save_statistics is not None
        or plan.kept_matrices is not None
        or config.applies_awq,
        scratch=Scratch(out.path if out is not None and plan.spills else None),
        solved_cache=out.solved_cache if out is not None and config.method == "gptq" else None,
        kept_matrices=None if plan.kept_matrices is None else KeptMatrices(plan.kept_matrices),
    )


def _passes(plan: Plan, text: CalibrationText) -> Iterator[Waiting | Finished]:
    """All batches of this process on their way through the model; of layers that are tuned, first
    those that run through the original model, then the same that run through the quantized one."""
    model, batches = plan.source.model, text.batches(plan.config.calibration)
    streams = 2 if plan.config.tune else 1
    inputs = [inputs_of(model, ids) for _ in range(streams) for ids in batches]
    return suspended(model, plan.source.stages(), inputs)


def _streams(plan: Plan, calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """The batches in the original model, and those in the quantized one."""
    half = len(calls) // 2 if plan.config.tune else 0
    return calls[:half], calls[half:]


def _is_last(plan: Plan, i: int) -> bool:
    """Nothing behind the last layer is of interest, unless lm_head is to be quantized. A layer that
    predicts tokens beyond the next is the last."""
    ends = plan.config.lm_head is None or plan.source.prediction is not None
    return ends and i + 1 == len(plan.source.structure.layers)


def _check_reached(plan: Plan, reached: set[int]) -> None:
    """In a list of layers that text runs through, all must have been reached. A part of the model
    that no text reaches, such as a vision tower, is rounded to nearest."""
    layers = plan.source.structure.layers
    lists = {layers[i].name.rpartition(".")[0] for i in reached}
    for i, layer in enumerate(layers):
        if plan.source.predicts(layer.name):
            if i in reached:
                raise UnsupportedModelError(f"{layer.name}: the model's own forward runs it")
        elif i not in reached and layer.name.rpartition(".")[0] in lists:
            raise UnsupportedModelError(f"{layer.name}: text runs past this layer of the model")


def _quantize(
    plan: Plan,
    settings: LayerSettings,
    out: OutputFolder,
    i: int,
    forward: Forward,
    calls: list[Call],
) -> Generator[Shard, None, list[Any]]:
    """Load, quantize and pack layer i; yields its shard where it is written, returns its outputs.
    Without calls and saved statistics it is rounded to nearest."""
    source, structure = plan.source, plan.source.structure.layers[i]
    schemes, outputs = schemes_of(source, structure, plan.config), list[Any]()
    with source.loaded(structure.name, torch.float32, plan.experts_dtype) as module:
        changed = rotate_layer(plan, structure)
        _read_ahead(plan, out, i + 1)
        move_to(module, plan.device)
        widths, last = widths_of(structure, plan.config), _is_last(plan, i)
        layer = LayerAtHand.of(source.model, structure, forward, schemes, last, widths)
        if calls:
            originals, calls = _streams(plan, calls)
            save = _saving(plan, out, i)
            made, outputs = quantize_layer(layer, settings, calls, originals, save)
        elif plan.statistics_from:
            about, files = plan.statistics_about, plan.statistics_files(i)
            parts = [statistics.load(file, about) for file in files]
            made = solve_layer(layer, settings, statistics.merge(parts))
        else:
            config = plan.config.rounded_to_nearest()
            rounding = replace(settings, config=config, solved_cache=None, refits=False)
            made = solve_layer(layer, rounding, LayerStats())
            made.record.unreached = plan.config.method != "rtn"
        if out.leads:
            names = source.weights.sources(structure.name)
            tensors = shard_tensors(source, names, made.weights, made.changed | changed)
            yield Shard(i, tensors, made.record, _digests(made.weights))
    return outputs


def _run_again(
    plan: Plan, scratch: Scratch, event: Waiting, weights: dict[str, Tensor]
) -> list[Any]:
    """The outputs of a layer that an earlier run quantized. weights: what that wrote, unpacked."""
    source, structure = plan.source, plan.source.structure.layers[event.index]
    layer = LayerAtHand.of(source.model, structure, event.forward)
    originals, calls = _streams(plan, event.calls)
    outputs: list[Any] = []
    if originals:
        with source.loaded(layer.name, torch.float32, plan.experts_dtype):
            rotate_layer(plan, structure)
            move_to(layer.module, plan.device)
            outputs += [scratch.keep(output) for output in layer.run(originals)]
    with source.freed_after(layer.name):
        restore(source, structure, weights, plan.experts_dtype)
        move_to(layer.module, plan.device)
        outputs += [scratch.keep(output) for output in layer.run(calls)]
    return outputs


def _read_ahead(plan: Plan, out: OutputFolder, i: int) -> None:
    """Have the operating system read what layer i is made of, if there is one."""
    source = plan.source
    if out.leads and i < len(source.structure.layers):
        names = source.weights.sources(source.structure.layers[i].name)
        read_ahead(source.checkpoint.files(names))


def rotate_layer(plan: Plan, layer: Layer) -> set[str]:
    """Rotate a layer that was loaded, if that is asked for; returns the parameters that are not as
    they are stored any more, and that are not to be packed."""
    if plan.rotation is None:
        return set()
    source = plan.source
    names = schemes_of(source, layer, plan.config)
    packed = packed_parameters({name: source.model.get_submodule(name) for name in names})
    return round_unpacked(source, plan.rotation.rotate_layer(source.model, layer.name), packed)


def _saving(plan: Plan, out: OutputFolder, i: int) -> Callable[[LayerStats], None] | None:
    """What keeps the statistics of layer i, if they are to be kept and this process writes."""
    path = plan.statistics_to(i)
    if path is None or not out.leads:
        return None
    about = plan.statistics_about | {"notes": json.dumps(plan.notes)}
    return lambda stats: statistics.save(stats, path, about)


def _digests(weights: dict[str, Stack]) -> dict[str, str]:
    return {target: digest(quantized) for target, quantized in weights.items()}
