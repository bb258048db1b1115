"""The rules of transformers without qmoe, which loads these folders through compressed-tensors and
expands them to 16 bits.

They are those of the installed releases: qmoe's tests load folders there.
"""

import re
from importlib.metadata import version

from qmoe.engines import common
from qmoe.engines.contents import Contents
from qmoe.engines.rule import Breaches, Engine, Rule, Setup

INTEGRATION = "transformers/integrations/compressed_tensors.py"


def _zero_points(contents: Contents, setup: Setup) -> Breaches:
    for matrix in contents.matrices:
        if not matrix.form.symmetric:
            yield matrix.name, f"it has {matrix.form}"


def _one_form(contents: Contents, setup: Setup) -> Breaches:
    """Over all layers."""
    experts = [matrix for matrix in contents.matrices if matrix.experts is not None]
    for matrix in experts:
        if matrix.form != experts[0].form:
            yield matrix.name, f"it has {matrix.form}, and {experts[0].name} has {experts[0].form}"


def _published(contents: Contents, setup: Setup) -> Breaches:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    known = get_checkpoint_conversion_mapping(contents.model_type) or []
    patterns = [p for entry in known for p in getattr(entry, "source_patterns", ())]
    wanted = [re.escape(p).replace(r"\*", r"\d+") for p in patterns if "*" in p]
    for matrices in contents.layers().values():
        name = f"{matrices[0].name}.weight"
        if not any(re.search(pattern, name) for pattern in wanted):
            yield (
                matrices[0].name,
                f"{contents.model_type} publishes all experts in one tensor",
            )


def _joins(contents: Contents, setup: Setup) -> Breaches:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    for entry in get_checkpoint_conversion_mapping(contents.model_type) or []:
        patterns: list[str] = list(getattr(entry, "source_patterns", []))
        joins = hasattr(entry, "operations") and len(patterns) > 1
        if joins and not any("*" in pattern for pattern in patterns):
            yield patterns[0], f"{contents.model_type} joins {len(patterns)} tensors of this kind"


def _no_weights(contents: Contents, setup: Setup) -> Breaches:
    if contents.text("zero_expert_num"):
        yield (
            "zero_expert_num",
            f"{contents.model_type} has {contents.text('zero_expert_num')} experts without weights",
        )


RULES = (
    Rule(
        "method",
        "transformers without qmoe has no method of this name.",
        "transformers/quantizers/auto.py: AUTO_QUANTIZER_MAPPING",
        "EXL3 folders run in exllamav3 and in qmoe.",
        common.method,
    ),
    Rule(
        "format",
        "transformers takes the format pack-quantized, and decodes all experts by one form.",
        f"{INTEGRATION}: CompressedTensorsDequantize",
        "Load the folder after `import qmoe`, or quantize without widths and --rotate online.",
        common.packed,
    ),
    Rule(
        "one form",
        "transformers decodes all experts of a model by one form.",
        f"{INTEGRATION}: get_experts_scheme",
        "Load the folder after `import qmoe`, or quantize without --size and without widths.",
        _one_form,
    ),
    Rule(
        "zero points",
        "transformers does not decode zero points.",
        f"{INTEGRATION}: CompressedTensorsDequantize",
        "Load the folder after `import qmoe`, or quantize without --asymmetric.",
        _zero_points,
    ),
    Rule(
        "family",
        "transformers finds single experts only where the family publishes them one by one.",
        "transformers/conversion_mapping.py: get_checkpoint_conversion_mapping",
        "Load the folder after `import qmoe`.",
        _published,
    ),
    Rule(
        "joined tensors",
        "transformers decodes tensors that it joins while it loads, and drops those that are not "
        "packed.",
        f"{INTEGRATION}: CompressedTensorsDequantize.convert",
        "Load the folder after `import qmoe`.",
        _joins,
    ),
    Rule(
        "experts without weights",
        "transformers' class has room for the weights of experts that have none, which qmoe does "
        "not write.",
        "transformers/models/longcat_flash/modeling_longcat_flash.py: LongcatFlashExperts",
        "Load the folder after `import qmoe`.",
        _no_weights,
    ),
)
ENGINE = Engine(
    "transformers",
    version("transformers"),
    RULES,
    "The rules are those of transformers without qmoe, which expands experts to 16 bits in memory; "
    "after `import qmoe` it runs every folder packed.",
)
