"""What is written beside the shards, once all of them are there: config.json, the files that belong
to the model, and the report, after an audit."""

import re
from copy import deepcopy
from typing import Any

from torch import Tensor

from qmoe._version import __version__
from qmoe.calibration.batches import fingerprint
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import UNIFORM_LAYERS
from qmoe.format.compressed_tensors import (
    EXPERTS_TARGET,
    Schemes,
    quantization_config,
    unpacked_tensors,
)
from qmoe.format.exl3_checkpoint import STORAGE, decoded_tensors, exl3_config, storage_table
from qmoe.model.schemes import exact_schemes, weight_shapes
from qmoe.model.source import schemes_of
from qmoe.model.tensor_names import matrices_in, matrix_names
from qmoe.packed.audit import audit_folder
from qmoe.packed.card import read_card, write_card
from qmoe.packed.report import REPORT, build_report, left_behind
from qmoe.pipeline.output import OutputFolder
from qmoe.pipeline.plan import Plan
from qmoe.pipeline.self_text import CalibrationText


def finish(
    plan: Plan, text: CalibrationText, out: OutputFolder, distilled: dict[str, Any]
) -> dict[str, Any]:
    """Write what goes beside the shards, audit the folder, and return its report. AuditError if the
    folder is not what was promised. distilled: what the report says of that phase, if anything."""
    source = plan.source
    out.write_index()
    left = out.copy_companions(source.folder.path)
    metadata, text_below, unread = read_card(out.path)
    config = new_config(plan)
    out.write_json("config.json", config)
    if plan.config.format == "exl3":
        entry = config["quantization_config"]
        out.write_json(STORAGE, entry | {"tensor_storage": storage_table(out.stored())})
    folder = ModelFolder(out.path, source.folder.trust_remote_code)
    digests = out.digests()
    audit = audit_folder(folder, digests, original=source)
    report = build_report(plan.config, source, out.records(), audit, __version__)
    report |= {
        "fallbacks": [
            *_fallbacks(plan, text), *report["fallbacks"], *left_behind(left), *out.unlocked(),
            *unread,
        ],
        "source_sha256": plan.source_sha256,
        "digests": digests,
        "unpacked_sha256": audit.unpacked_sha256,
        "calibration": _calibration(plan, text),
    }  # fmt: skip
    if "left_out" in distilled:
        report["fallbacks"].append(f"the model was not distilled: {distilled['left_out']}")
    elif distilled:
        report["distilled"] = distilled
    if "stopped" in distilled:
        report["fallbacks"].append(f"distilling ended early: {distilled['stopped']}")
    out.write_json(REPORT, report)
    write_card(out.path, report, metadata, text_below)
    return report


def new_config(plan: Plan) -> dict[str, Any]:
    """The source's config.json with `quantization_config` added."""
    config = deepcopy(plan.source.checkpoint.config)
    config.pop("transformers_weights", None)  # names what was read, not what is written
    c = plan.config
    unquantized = plan.source.unquantized_linears(c)
    if plan.rotation is not None and plan.rotation.untied is not None:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    if c.format == "exl3":
        config["quantization_config"] = exl3_config(c)
        return config
    exact = exact_schemes(plan.source, c)
    routed = any(re.fullmatch(EXPERTS_TARGET[3:], name) for name in exact)
    mixed = routed and c.target not in UNIFORM_LAYERS
    config["quantization_config"] = quantization_config(
        c.experts, c.dense, c.lm_head, unquantized, exact, mixed
    )
    return config


def unpacked(plan: Plan, i: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of layer i's shard with every packed weight as the matrix it stands for."""
    source = plan.source
    if plan.config.format != "exl3":
        return unpacked_tensors(tensors, Schemes(new_config(plan), str(plan.dst)))
    shapes: dict[str, tuple[int, int]] = {}
    for name in schemes_of(source, source.structure.layers[i], plan.config):
        for target, shape in weight_shapes(source.model, name):
            *stack, n, k = shape
            count = matrices_in(source.model, target)
            names = matrix_names(source.model, target, stack[0] if stack else None, count)
            shapes |= dict.fromkeys(names, (n // count, k))
    return decoded_tensors(tensors, shapes)


def _fallbacks(plan: Plan, text: CalibrationText) -> list[str]:
    """In words, what of the whole run did not go the regular way."""
    lines = list(plan.notes)
    if text.fallback:
        lines.append(text.fallback)
    if plan.config.refit and plan.config.method == "gptq" and not plan.refits:
        lines.append("matrices are not refitted: statistics come from files or go to files")
    if plan.config.target in UNIFORM_LAYERS and exact_schemes(plan.source, plan.config):
        lines.append("layers differ in their bits: plain transformers would decode them wrongly")
    if plan.rotation is not None and (lm_head := plan.rotation.untied) is not None:
        untied = f"{lm_head}: stored apart from the embedding, from which the rotation sets it off"
        lines.insert(0, untied)
    return lines


def _calibration(plan: Plan, text: CalibrationText) -> dict[str, Any]:
    """What the statistics come from."""
    if plan.statistics_from:
        return {"statistics": [str(folder) for folder in plan.statistics_from]}
    if not len(text.samples):
        return {}
    return {
        "samples": list(text.samples.shape),
        "self_samples": text.self_samples,
        "sha256": fingerprint(text.samples),
    }
