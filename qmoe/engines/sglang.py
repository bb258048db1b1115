"""The rules of SGLang on NVIDIA GPUs.

They are read from the sources of release 0.5.23: of sglang/srt/layers/quantization/
compressed_tensors and of the Marlin kernels that it calls.
"""

from qmoe.engines import common
from qmoe.engines.contents import Contents
from qmoe.engines.rule import Breaches, Engine, Rule, Setup

QUANTIZATION = "sglang/srt/layers/quantization/compressed_tensors"
MARLIN = "sglang/srt/layers/quantization/marlin_utils.py"
USUAL, SHORT = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "ernie4_5_moe", "glm4_moe", "olmoe", "qwen2_moe",
         "qwen3_5_moe", "qwen3_moe", "qwen3_next"),
        USUAL,
    ),
    "mixtral": SHORT,
    "gpt_oss": (),  # MXFP4 or 16 bits alone
}  # fmt: skip


def _zero_points(contents: Contents, setup: Setup) -> Breaches:
    for matrix in contents.matrices:
        if not matrix.form.symmetric and matrix.form.bits != 4:
            yield matrix.name, f"it has {matrix.form}"


def _experts_by_marlin(contents: Contents, setup: Setup) -> Breaches:
    for matrix, hidden, size in common.inner(contents, setup):
        if hidden % 128 or size % 64:
            yield (
                matrix.name,
                f"the hidden size is {hidden}, and a device has {size} inner features",
            )


def _linears_by_marlin(contents: Contents, setup: Setup) -> Breaches:
    for matrices, _ in contents.joined():
        shares = [matrix.share(setup.tp) for matrix in matrices]
        outputs, inputs = sum(n for n, _ in shares), shares[0][1]
        if outputs % 64 or inputs % 128:
            yield matrices[0].name, f"a device has {inputs} inputs and {outputs} outputs"


def _latent(contents: Contents, setup: Setup) -> Breaches:
    for matrix in contents.linears():
        if matrix.last == "kv_b_proj":
            yield matrix.name, f"it has {matrix.form}"


RULES = (
    Rule(
        "method",
        "SGLang has no method of this name.",
        "sglang/srt/layers/quantization/__init__.py: QUANTIZATION_METHODS",
        "EXL3 folders run in exllamav3 and in qmoe; for SGLang quantize with --format "
        "compressed-tensors.",
        common.method,
    ),
    Rule(
        "format",
        "SGLang takes the format pack-quantized, for the whole folder.",
        f"{QUANTIZATION}/schemes/compressed_tensors_wNa16_moe.py: CompressedTensorsWNA16MoE",
        "Quantize with --target sglang, and without --rotate online.",
        common.one_packed,
    ),
    Rule(
        "one form",
        "SGLang reads the form of a layer's first expert, gives it to all experts, and refuses "
        "gate, up and down that differ.",
        f"{QUANTIZATION}/compressed_tensors.py: get_moe_scheme",
        "Quantize with --target sglang, which gives a layer one width.",
        common.one_form,
    ),
    Rule(
        "joined linears",
        "SGLang joins these linears into one, which has one form.",
        f"{QUANTIZATION}/utils.py: should_ignore_layer, find_matched_target",
        "Give them the same bits (--target sglang does).",
        common.joined_alike,
    ),
    Rule(
        "bits",
        "SGLang takes 4 and 8 bits.",
        f"{QUANTIZATION}/schemes/compressed_tensors_wNa16.py: WNA16_SUPPORTED_BITS",
        "Quantize with --bits 4 or 8, and --dense-bits 4, 8 or 16.",
        common.bits((4, 8)),
    ),
    Rule(
        "zero points",
        "SGLang's Marlin kernels take zero points with 4 bits alone.",
        f"{MARLIN}: query_marlin_supported_quant_types",
        "Leave zero points out, or take 4 bits.",
        _zero_points,
    ),
    Rule(
        "groups of experts",
        "In SGLang groups divide the inputs that each device has of an expert's matrix.",
        f"{QUANTIZATION}/schemes/compressed_tensors_wNa16_moe.py: create_weights",
        "Take a smaller --group-size, or fewer devices.",
        common.experts_in_groups,
    ),
    Rule(
        "Marlin for experts",
        "SGLang's Marlin kernel for experts needs a hidden size that 128 divides, and an inner "
        "size of each device that 64 divides.",
        f"{MARLIN}: check_moe_marlin_supports_layer",
        "Take fewer devices, or another engine.",
        _experts_by_marlin,
    ),
    Rule(
        "groups of linears",
        "In SGLang devices and groups divide the inputs of a linear.",
        f"{QUANTIZATION}/schemes/compressed_tensors_wNa16.py: create_weights",
        "Take fewer devices, smaller groups, or --dense-bits 16.",
        common.linears_in_groups,
    ),
    Rule(
        "Marlin for linears",
        "SGLang's Marlin kernel for linears needs inputs of each device that 128 divides, and "
        "outputs that 64 divides.",
        f"{MARLIN}: verify_marlin_supports_shape",
        "Take fewer devices, or --dense-bits 16.",
        _linears_by_marlin,
    ),
    Rule(
        "latent attention",
        "SGLang takes kv_b_proj apart after loading, for which it must not be packed.",
        "sglang/srt/models/deepseek_common/deepseek_weight_loader.py: post_load_weights",
        "Quantize with --dense-bits 16.",
        _latent,
    ),
    Rule(
        "heads",
        "In SGLang devices divide attention heads.",
        "sglang/srt/models/qwen3_moe.py: Qwen3MoeAttention; others likewise",
        "Take fewer devices.",
        common.heads,
    ),
    Rule(
        "family",
        "SGLang has to know the family, and to load its experts one by one under these names.",
        "sglang/srt/models: load_weights of the family",
        "Run the folder in qmoe or transformers, or ask SGLang for the family.",
        common.named(FAMILIES, "SGLang"),
    ),
)
ENGINE = Engine(
    "sglang",
    "0.5.23",
    RULES,
    "The rules are those of its kernels for NVIDIA GPUs of compute capability 8.0 and above; "
    "memory and speed are not looked at.",
)
