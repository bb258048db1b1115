"""The rules of vLLM without a plugin.

They are read from the sources of release 0.32.0: of vllm/model_executor/layers/quantization/
compressed_tensors and of the kernels that it chooses from. On NVIDIA GPUs its requirements bring
Humming, which takes any width; without that package 2 and 3 bits do not run there.
"""

from qmoe.engines import common
from qmoe.engines.contents import Contents, Matrix
from qmoe.engines.rule import Breaches, Engine, Rule, Setup

QUANTIZATION = "vllm/model_executor/layers/quantization/compressed_tensors"
MOE = f"{QUANTIZATION}/compressed_tensors_moe"
KERNELS = "vllm/model_executor/kernels/linear/mixed_precision"
USUAL, SHORT = ("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")
# Families whose model in vLLM loads experts one by one, by the names of their matrices.
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("cohere2_moe", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe",
         "glm4_moe", "glm4_moe_lite", "hy_v3", "llama4", "llama4_text", "longcat_flash",
         "mimo_v2_flash", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe",
         "qwen3_next", "qwen3_vl_moe"),
        USUAL,
    ),
    **dict.fromkeys(("lfm2_moe", "minimax_m2", "mixtral"), SHORT),
    "nemotron_h": ("up_proj", "down_proj"),
    "gpt_oss": (),  # MXFP4, Quark or 16 bits alone
}  # fmt: skip


def _by_marlin(bits: int, symmetric: bool, hidden: int) -> bool:
    """Whether Marlin's kernel for experts takes them."""
    known = bits == 4 or (bits == 8 and symmetric)
    return known and hidden % 128 == 0


def _channel_wise(contents: Contents, setup: Setup) -> Breaches:
    for matrices in contents.layers().values():
        first = matrices[0]
        hidden = contents.text("hidden_size") or first.inputs
        form = first.form
        if form.group == -1 and not (
            setup.device == "cuda" and _by_marlin(form.bits, form.symmetric, hidden)
        ):
            yield first.name, f"it has {form}, for a hidden size of {hidden}"


def _eight_with_zero_points(contents: Contents, setup: Setup) -> Breaches:
    for matrices in contents.layers().values():
        form = matrices[0].form
        if form.bits == 8 and not form.symmetric:
            yield matrices[0].name, f"it has {form}"


def _zero_points(contents: Contents, setup: Setup) -> Breaches:
    for matrix, hidden, size in common.inner(contents, setup):
        bits = matrix.form.bits
        if matrix.form.symmetric:
            continue
        if 2 * size * bits % 32 or hidden * bits % 32:
            yield (
                matrix.name,
                f"{bits} bits of {2 * size} gate and up outputs, {hidden} of down",
            )


def _experts_on_cpu(contents: Contents, setup: Setup) -> Breaches:
    for matrices in contents.layers().values() if setup.device == "cpu" else ():
        form = matrices[0].form
        if form.bits != 4 or not form.symmetric or form.group == 32:
            yield matrices[0].name, f"it has {form}"


def _linears_on_cpu(contents: Contents, setup: Setup) -> Breaches:
    for matrices, _ in contents.joined() if setup.device == "cpu" else ():
        shares = [matrix.share(setup.tp) for matrix in matrices]
        outputs, inputs = sum(n for n, _ in shares), shares[0][1]
        first: Matrix = matrices[0]
        if first.form.bits != 4:
            yield first.name, f"it has {first.form}"
        elif outputs % 32 or inputs % 32:
            yield first.name, f"a device has {inputs} inputs and {outputs} outputs"


RULES = (
    Rule(
        "method",
        "vLLM has no method of this name.",
        "vllm/model_executor/layers/quantization/__init__.py: QUANTIZATION_METHODS",
        "EXL3 folders run in exllamav3 and in qmoe; for vLLM quantize with --format "
        "compressed-tensors.",
        common.method,
    ),
    Rule(
        "format",
        "vLLM takes the format pack-quantized.",
        f"{MOE}/compressed_tensors_moe.py: get_moe_method; {QUANTIZATION}/compressed_tensors.py: "
        "_get_scheme_from_parts",
        "Quantize with --target vllm, and without --rotate online.",
        common.packed,
    ),
    Rule(
        "one form",
        "vLLM reads the form of a layer's first expert, gives it to all experts, and refuses gate, "
        "up and down that differ.",
        f"{MOE}/compressed_tensors_moe.py: get_moe_method",
        "Quantize with --target vllm, which gives a layer one width.",
        common.one_form,
    ),
    Rule(
        "joined linears",
        "vLLM joins these linears into one, which has one form.",
        f"{QUANTIZATION}/utils.py: _match_fused_layer, should_ignore_layer",
        "Give them the same bits (--target vllm does).",
        common.joined_alike,
    ),
    Rule(
        "bits",
        "vLLM takes 2 to 8 bits.",
        f"{QUANTIZATION}/schemes/compressed_tensors_wNa16.py: WNA16_SUPPORTED_TYPES_MAP",
        "Choose bits from 2 to 8.",
        common.bits(range(2, 9)),
    ),
    Rule(
        "channel-wise",
        "vLLM runs channel-wise experts with Marlin alone: 4 bits, or 8 bits without zero points, "
        "and a hidden size that 128 divides, on an NVIDIA GPU.",
        f"{MOE}/compressed_tensors_moe_wna16.py: __init__; vllm/model_executor/layers/quantization/"
        "utils/marlin_utils.py: check_moe_marlin_supports_config",
        "Give experts groups (--group-size).",
        _channel_wise,
    ),
    Rule(
        "8 bits with zero points",
        "vLLM has no kernel for experts of 8 bits with zero points.",
        "vllm/model_executor/layers/fused_moe/oracle/int_wna16.py: select_wna16_moe_backend",
        "Leave zero points out, or take 4 bits or less.",
        _eight_with_zero_points,
    ),
    Rule(
        "groups of experts",
        "In vLLM groups divide the inputs that each device has of an expert's matrix.",
        f"{MOE}/compressed_tensors_moe_wna16.py: create_weights",
        "Take a smaller --group-size, fewer devices, or expert parallelism.",
        common.experts_in_groups,
    ),
    Rule(
        "zero points",
        "vLLM cuts zero points of experts at whole words of 32 bits.",
        f"{MOE}/compressed_tensors_moe_wna16.py: create_weights",
        "Take fewer devices, or leave zero points out.",
        _zero_points,
    ),
    Rule(
        "groups of linears",
        "In vLLM devices and groups divide the inputs of a linear.",
        "vllm/distributed/utils.py: divide, verify_group_size_divides_partition",
        "Take fewer devices, smaller groups, or --dense-bits 16.",
        common.linears_in_groups,
    ),
    Rule(
        "heads",
        "In vLLM devices divide attention heads.",
        "vllm/model_executor/models/qwen3_moe.py: Qwen3MoeAttention; others likewise",
        "Take fewer devices.",
        common.heads,
    ),
    Rule(
        "experts on a CPU",
        "On a CPU vLLM runs experts of 4 bits without zero points, in groups other than 32, if the "
        "processor has AMX.",
        "vllm/model_executor/layers/fused_moe/experts/cpu_moe.py: CPUExpertsInt4; "
        f"{MOE}/compressed_tensors_moe_wna16.py: __init__",
        "Quantize experts with --bits 4 --group-size 64 or 128, or use a GPU.",
        _experts_on_cpu,
    ),
    Rule(
        "linears on a CPU",
        "On a CPU vLLM runs linears of 4 bits with inputs and outputs that 32 divides.",
        f"{KERNELS}/cpu.py: CPUWNA16LinearKernel.can_implement",
        "Quantize with --dense-bits 4 or 16, or use a GPU.",
        _linears_on_cpu,
    ),
    Rule(
        "family",
        "vLLM has to know the family, and to load its experts one by one under these names.",
        "vllm/model_executor/models: load_weights of the family",
        "Run the folder in qmoe or transformers, or ask vLLM for the family.",
        common.named(FAMILIES, "vLLM"),
    ),
)
ENGINE = Engine(
    "vllm",
    "0.32.0",
    RULES,
    "The rules are those of vLLM without a plugin; memory and speed are not looked at. On GPUs 2 "
    "and 3 bits need humming-kernels, which vLLM's requirements name; on a CPU experts need AMX.",
)
