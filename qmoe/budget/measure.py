"""The measuring pass: one run of calibration text through the original model.

At every layer each matrix is solved at all widths on what the original gives it. Beside the text,
short probes run through the model: one through the original, and one for each group of matrices
(measurements.py) through the original with that group at PROBE bits. They wait at layers like all
text, so the model is still read one layer at a time, and a probe is only computed from its group's
layer on. What the probes predict at the end, compared with the original's, is the groups' KL.

What is found of a layer is kept in the folder of unfinished work (kept_layers.py), so that a pass
that was stopped solves nothing twice; text and probes run through its layers again.

Left out: refitting and tuning, which come when the choice is made.
"""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from qmoe.budget.kept_layers import keep_layer, kept_layer
from qmoe.budget.lm_head import LmHead
from qmoe.budget.measurements import PROBE, Measured, Measurements
from qmoe.budget.solve_all import Solution, laid_out, solve_experts, solve_linear
from qmoe.calibration.stats import LayerStats, save
from qmoe.errors import CalibrationError
from qmoe.layer import unfused
from qmoe.layer.at_hand import LayerAtHand, LayerSettings
from qmoe.layer.statistics import collect_statistics
from qmoe.model import experts
from qmoe.model.hooks import hooked
from qmoe.model.layerwise import Call, Finished, Waiting, suspended
from qmoe.model.skeleton import inputs_of
from qmoe.model.source import schemes_of
from qmoe.pipeline.layers import layer_settings, load_outside, rotate_layer
from qmoe.pipeline.output import OutputFolder
from qmoe.pipeline.plan import STATISTICS, Plan, statistics_file
from qmoe.pipeline.self_text import CalibrationText
from qmoe.system.devices import move_to
from qmoe.system.progress import progress

PROBES, ROOM = 8, 1 << 28  # samples in a probe, and bytes of its predictions, at most


@dataclass
class Probes:
    """Where probes are among the batches. groups: by name, in the order of the layers. kl: of those
    that have finished."""

    first: int
    groups: list[str]
    kl: dict[str, float] = field(default_factory=dict)
    reference: Tensor | None = None

    def finished(self, i: int, logits: Tensor) -> None:
        """Batch i has run through the model."""
        if i < self.first:
            return
        predicted = logits[:, :-1].float().log_softmax(-1)
        if self.reference is None:
            self.reference = predicted
            return
        base = self.reference
        each = torch.where(base > -torch.inf, base.exp() * (base - predicted), 0).sum(-1)
        self.kl[self.groups[i - self.first - 1]] = float(each.double().mean().clamp(min=0))


@torch.no_grad()
def measure(
    plan: Plan, text: CalibrationText, about: dict[str, str], out: OutputFolder
) -> Measurements:
    """Measure every matrix of a model that `plan.config` quantizes in the layers. out: where what
    is found of each layer is kept. Raises CalibrationError if the model predicts nothing on the
    probes."""
    load_outside(plan)
    settings, head = layer_settings(plan, text, None), LmHead.of(plan)
    model, batches = plan.source.model, text.batches(plan.config.calibration)
    layers = plan.source.structure.layers
    groups = [g for i in range(len(layers)) for g in _groups(plan, i)]
    probes = Probes(len(batches), groups if head is None else [*groups, head.name])
    ids = [*batches, *[_probe(plan)] * (1 + len(probes.groups))]
    passes = suspended(model, plan.source.stages(), [inputs_of(model, each) for each in ids])
    bar, parts, done = iter(progress(layers, "measuring layers")), list[Measured](), 0
    with hooked([] if head is None else [(head.module, head.collect)]):
        for event in passes:
            if isinstance(event, Finished):
                probes.finished(done, event.output.logits)
                done += 1
                if head is not None and done == len(batches):
                    parts.append(head.solve(settings))
                if head is not None and done == len(ids) - 1:
                    head.swap()  # for the last probe
            else:
                next(bar)
                found, outputs = _layer(plan, settings, event, probes, out)
                parts += found
                event.go_on(outputs)
    next(bar, None)  # lets the progress bar close
    if head is not None:
        head.swap()
    wrong = [group for group, kl in probes.kl.items() if not kl < float("inf")]
    if wrong:
        raise CalibrationError(f"{wrong[0]}: with this at {PROBE} bits the model predicts nothing")
    return Measurements(about, parts, probes.kl)


def _probe(plan: Plan) -> Int[Tensor, "n L"]:
    """Some of the calibration samples, spread evenly over them."""
    text, vocabulary = plan.samples, plan.source.model.config.get_text_config().vocab_size
    count = max(2, min(PROBES, ROOM // (4 * vocabulary * text.shape[1])))
    return text[:: max(1, len(text) // count)][:count]


def _groups(plan: Plan, i: int) -> list[str]:
    """The groups of layer i, in the order in which they are measured."""
    layer = plan.source.structure.layers[i]
    schemes = schemes_of(plan.source, layer, plan.config)
    stacks = [
        f"{name}.{weight}"
        for name in layer.experts
        for weight in experts.expert_weights(plan.source.model.get_submodule(name))
    ]
    return [*(n for n in layer.dense if n in schemes), *stacks, *layer.unfused]


def _layer(
    plan: Plan, settings: LayerSettings, event: Waiting, probes: Probes, out: OutputFolder
) -> tuple[list[Measured], list[Any]]:
    """What is measured of a layer at which all batches wait, and their outputs."""
    source, structure = plan.source, plan.source.structure.layers[event.index]
    schemes = schemes_of(source, structure, plan.config)
    text, probe, tried = event.calls[: probes.first], event.calls[probes.first], event.calls
    with source.loaded(structure.name, torch.float32, plan.experts_dtype) as module:
        rotate_layer(plan, structure)
        move_to(module, plan.device)
        layer = LayerAtHand.of(source.model, structure, event.forward, schemes)
        if event.index in out.finished:
            solved = kept_layer(out, event.index)
        else:
            solved = list(_solved(layer, settings, text, _keeping(plan, event.index)))
            keep_layer(out, event.index, solved)
        outputs = [settings.scratch.keep(output) for output in layer.run([*text, probe])]
        mine = _groups(plan, event.index)
        parts, changed = list[Measured](), dict[str, Any]()
        for group, solution in solved:
            parts += solution.measured
            changed[group] = settings.scratch.keep(_with(layer, solution, probe))
        earlier = True
        for k, group in enumerate(probes.groups):
            earlier = earlier and group not in mine
            if earlier:
                [output] = layer.run([tried[probes.first + 1 + k]])
                outputs.append(settings.scratch.keep(output))
            else:
                # A copy, since some families change their states in place.
                own = changed[group] if group in changed else deepcopy(outputs[probes.first])
                outputs.append(own)
    return parts, outputs


def _with(layer: LayerAtHand, solution: Solution, probe: Call) -> Any:
    """The layer's output with some of its weights replaced for that long."""
    parameters = {name: layer.parameter(name) for name in solution.probes}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, stack in solution.probes.items():
        parameters[name].data.copy_(laid_out(layer, name, stack))
    [output] = layer.run([probe])
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
    return output


def _keeping(plan: Plan, i: int) -> Callable[[LayerStats], None] | None:
    """What keeps the statistics of layer i, if matrices are kept."""
    if plan.kept_matrices is None:
        return None
    folder = plan.kept_matrices.with_name(STATISTICS)
    folder.mkdir(exist_ok=True)
    about = plan.statistics_about | {"notes": json.dumps(plan.notes)}
    return lambda found: save(found, folder / statistics_file(i), about)


def _solved(
    layer: LayerAtHand,
    settings: LayerSettings,
    text: list[Call],
    keep: Callable[[LayerStats], None] | None,
) -> Iterator[tuple[str, Solution]]:
    """The groups of a layer, in the order of `_groups`, solved on the calibration text. keep: is
    given its statistics."""
    structure = layer.structure
    names = [*structure.dense, *structure.experts, *structure.unfused_linears()]
    names = [name for name in names if name in layer.schemes]
    stats, _ = collect_statistics(layer, settings, names, text, keep=False)
    if keep is not None:
        keep(stats)
    for name in layer.structure.dense:
        if name in layer.schemes:
            linear = stats.linears.get(name)
            hessian = None if linear is None else linear.hessian
            tokens = 0 if linear is None else int(linear.tokens)
            yield name, solve_linear(layer, settings, name, hessian, tokens, name)
    for name in layer.experts:
        yield from solve_experts(layer, settings, name, stats.of_experts(name))
    records = unfused.borrow(layer, layer.structure.unfused_linears(), stats,
                             settings.config.min_tokens)  # fmt: skip
    for name, each in layer.structure.unfused.items():
        counts = (records[name].tokens if name in records else None) or [0] * len(each)
        group = Solution([], {})
        for count, linears in zip(counts, each, strict=True):
            for own in linears:
                seen = stats.linears.get(own)
                hessian = None if seen is None else seen.hessian
                one = solve_linear(layer, settings, own, hessian, count, name)
                group.measured.extend(one.measured)
                group.probes.update(one.probes)
        yield name, group
