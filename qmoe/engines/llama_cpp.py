"""The rules of llama.cpp, by way of `qmoe export --to gguf`.

They are those of qmoe/export: of its families (families.py) and of the block types that hold its
grids (block_types.py). Whether scales fit float16 depends on weights, which are not read here.
"""

from importlib.metadata import version

from transformers import AutoConfig

from qmoe.checkpoint.model_config import CONFIG_ERRORS
from qmoe.engines import common
from qmoe.engines.contents import Contents
from qmoe.engines.rule import Breaches, Engine, Rule, Setup
from qmoe.errors import UnsupportedModelError
from qmoe.export.families import family_of


def _family(contents: Contents, setup: Setup) -> Breaches:

    values = {k: v for k, v in contents.config.items() if k != "quantization_config"}
    try:
        family_of(AutoConfig.for_model(values.pop("model_type"), **values))
    except (UnsupportedModelError, *CONFIG_ERRORS) as error:
        yield "config.json", str(error)


def _blocks(contents: Contents, setup: Setup) -> Breaches:
    for matrix in contents.matrices:
        form = matrix.form
        if form.bits not in (2, 3, 4, 8) or (form.bits == 8 and not form.symmetric):
            yield matrix.name, f"it has {form}"
        elif matrix.inputs % 32:
            yield matrix.name, f"it has {matrix.inputs} inputs"


RULES = (
    Rule(
        "method",
        "The export reads integers in compressed-tensors' form.",
        "qmoe/export/to_gguf.py: export",
        "EXL3 folders run in exllamav3 and in qmoe; for llama.cpp quantize with --format "
        "compressed-tensors.",
        common.method,
    ),
    Rule(
        "rotation",
        "llama.cpp rotates no inputs at run time.",
        "qmoe/export/planned.py: planned",
        "Quantize with --rotate fused or off.",
        lambda contents, setup: (
            breach for breach in common.packed(contents, setup) if "rotated" in breach[1]
        ),
    ),
    Rule(
        "block types",
        "llama.cpp's block types hold 2, 3 and 4 bits, and 8 bits without zero points, in rows "
        "that 32 divides.",
        "qmoe/export/block_types.py: BLOCK_TYPES",
        "Quantize with --target llama.cpp.",
        _blocks,
    ),
    Rule(
        "family",
        "llama.cpp has to run the family as transformers does.",
        "qmoe/export/families.py: FAMILIES",
        "Run the folder in qmoe.",
        _family,
    ),
)
ENGINE = Engine(
    "llama.cpp",
    f"by gguf {version('gguf')}",
    RULES,
    "The rules are those of `qmoe export --to gguf`. Whether scales fit float16, and which block "
    "type they fit, depends on weights, which are not read.",
)
