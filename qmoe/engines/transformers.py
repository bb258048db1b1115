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


def _one_form(routed: bool) -> common.Broken:
    """Over all layers: of the routed experts, or of all other matrices."""

    def broken(contents: Contents, setup: Setup) -> Breaches:
        some = [matrix for matrix in contents.matrices if (matrix.experts is not None) == routed]
        for matrix in some:
            if matrix.form != some[0].form:
                yield matrix.name, f"it has {matrix.form}, and {some[0].name} has {some[0].form}"

    return broken


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


RULES = (
    Rule(
        "transformers without qmoe has no method of this name.",
        "transformers/quantizers/auto.py: AUTO_QUANTIZER_MAPPING",
        "EXL3 folders run in exllamav3 and in qmoe.",
        common.method,
    ),
    Rule(
        "transformers takes the format pack-quantized, and decodes all experts by one form.",
        f"{INTEGRATION}: CompressedTensorsDequantize",
        "Load the folder after `import qmoe`, or quantize without widths and --rotate online.",
        common.packed,
    ),
    Rule(
        "transformers decodes all experts of a model by one form.",
        f"{INTEGRATION}: get_experts_scheme",
        "Load the folder after `import qmoe`, or quantize without --size and without widths.",
        _one_form(routed=True),
    ),
    Rule(
        "transformers decodes all other matrices of a model by one form.",
        f"{INTEGRATION}: get_dense_scheme",
        "Load the folder after `import qmoe`, or give lm_head and all linears the same bits and "
        "groups.",
        _one_form(routed=False),
    ),
    Rule(
        "transformers does not decode zero points.",
        f"{INTEGRATION}: CompressedTensorsDequantize",
        "Load the folder after `import qmoe`, or quantize without --asymmetric.",
        _zero_points,
    ),
    Rule(
        "transformers finds single experts only where the family publishes them one by one.",
        "transformers/conversion_mapping.py: get_checkpoint_conversion_mapping",
        "Load the folder after `import qmoe`.",
        _published,
    ),
)
ENGINE = Engine(
    "transformers",
    version("transformers"),
    RULES,
    "The rules are those of transformers without qmoe, which expands experts to 16 bits in memory; "
    "after `import qmoe` it runs every folder packed.",
)
