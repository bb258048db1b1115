"""The last phase of a run: what was distilled is put into the shards of the finished layers."""

import json
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qmoe.distill.stacks import lm_head_stack, stacks_of
from qmoe.distill.student import Student
from qmoe.distill.teacher import Teacher
from qmoe.distill.train import Samples, Training
from qmoe.format.quantized import Quantized
from qmoe.format.stacks import digest
from qmoe.layer.at_hand import LayerAtHand
from qmoe.layer.records import LayerRecord
from qmoe.model.layerwise import Call, Forward
from qmoe.model.tensor_names import original_names
from qmoe.pipeline.layers import rotate_layer
from qmoe.pipeline.output import DISTILLED, OutputFolder, Shard
from qmoe.pipeline.plan import Plan
from qmoe.pipeline.self_text import CalibrationText
from qmoe.pipeline.shard import scale_tensors, stored_dtype
from qmoe.system.devices import move_to
from qmoe.system.files import write_safetensors
from qmoe.system.spill import Scratch


def distill(plan: Plan, text: CalibrationText, out: OutputFolder) -> dict[str, Any]:
    """Distil the model of an unfinished folder whose shards are all written; returns what the
    report says of it.

    Nothing of the folder changes until the last step is done. Then what was found is written as a
    file of its own, and put into the shards one after the other: a run that was killed while they
    were written goes on there, one that was killed before distils again, to the same values.
    """
    path = out.path / DISTILLED
    if not path.exists():
        work = training(plan, text, out)
        told = work.train()
        write_safetensors(path, work.student.moved(), {"told": json.dumps(told)})
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["told"])
        moved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for i in range(plan.shards):
        out.write_shard(with_moved(plan, out, i, moved))
    return dict(told)


def training(plan: Plan, text: CalibrationText, out: OutputFolder) -> Training:
    """What distils the model of an unfinished folder; runs the text through the original."""
    source, c = plan.source, plan.config.calibration
    scratch = Scratch(out.path if plan.spills else None)
    samples = Samples.of(text.samples, c.batch, c.seed)
    original = partial(_run_original, plan, scratch)
    teacher = Teacher.of(source, [*samples.train, *samples.held_out], original)
    dtype = partial(stored_dtype, source)
    student = Student(source, plan.config, plan.device, scratch, dtype, out.tensors)
    student.begin()
    return Training(student, teacher, samples, plan.config.distill, c.seed)


def _run_original(
    plan: Plan, scratch: Scratch, i: int, forward: Forward, calls: list[Call]
) -> list[Any]:
    """Layer i's outputs in the original model."""
    structure = plan.source.structure.layers[i]
    with plan.source.loaded(structure.name, torch.float32, plan.experts_dtype) as module:
        rotate_layer(plan, structure)
        move_to(module, plan.device)
        layer = LayerAtHand.of(plan.source.model, structure, forward)
        return [scratch.keep(output) for output in layer.run(calls)]


def with_moved(plan: Plan, out: OutputFolder, i: int, moved: dict[str, Tensor]) -> Shard:
    """Shard i with these values in it. moved: scales [E, N, G] of quantized parameters under their
    names with `_scale`, and other parameters, all in the dtypes that they are stored in."""
    source, layers = plan.source, plan.source.structure.layers
    tensors = out.tensors(i)
    record, digests = out.note(i)["record"], out.note(i)["digests"]
    found: dict[str, Quantized] = {}
    if i < len(layers):
        found = stacks_of(source, layers[i], plan.config, tensors)
        inside = tuple(name for name in moved if name.startswith(f"{layers[i].name}."))
    else:
        found = lm_head_stack(source, plan.config, tensors)
        named = tuple(f"{layer.name}." for layer in layers)
        inside = tuple(name for name in moved if not name.startswith(named))
    scales = {f"{target}_scale": target for target in found}
    for name in inside:
        if name in scales:
            target = scales[name]
            stack = replace(found[target], scale=moved[name])
            tensors |= scale_tensors(source, target, stack.scale)
            digests[target] = digest(stack)
        else:
            tensors |= original_names(source.model, name, moved[name])
    done = None if record is None else LayerRecord.from_json(record)
    return Shard(i, tensors, done, digests)
