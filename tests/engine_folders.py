"""Quantized folders of which there are headers alone, as the rules of engines look at them."""

import json
from pathlib import Path
from typing import Any

from qmoe.checkpoint.headers import write_header

Form = tuple[int, int, bool]  # bits, group (-1 for one scale per output), symmetric
NAMES = {"mixtral": ("w1", "w3", "w2")}
BLOCKS = {"mixtral": "block_sparse_moe"}
LAYER = "model.layers.0"


def make_folder(
    folder: Path,
    *,
    family: str = "qwen3_moe",
    hidden: int = 256,
    inner: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    experts: Form = (4, 64, True),
    dense: Form | None = (8, -1, True),
    own: dict[str, Form] | None = None,
    latent: bool = False,
    form: str = "pack-quantized",
    method: str = "compressed-tensors",
    **config: Any,
) -> Path:
    """One layer with two experts and attention. own: forms of single modules, by their names in
    layer 0. dense None leaves attention in 16 bits. latent: with the linear that DeepSeek's
    attention has."""
    folder.mkdir()
    own = {f"{LAYER}.{name}": value for name, value in (own or {}).items()}
    block = f"{LAYER}.{BLOCKS.get(family, 'mlp')}.experts"
    gate, up, down = NAMES.get(family, ("gate_proj", "up_proj", "down_proj"))
    size = hidden // heads
    routed = {
        f"{block}.{e}.{name}": shape
        for e in range(2)
        for name, shape in ((gate, (inner, hidden)), (up, (inner, hidden)), (down, (hidden, inner)))
    }
    linears = {
        f"{LAYER}.self_attn.q_proj": (heads * size, hidden),
        f"{LAYER}.self_attn.k_proj": (kv_heads * size, hidden),
        f"{LAYER}.self_attn.v_proj": (kv_heads * size, hidden),
        f"{LAYER}.self_attn.o_proj": (hidden, heads * size),
    }
    if latent:
        linears[f"{LAYER}.self_attn.kv_b_proj"] = (hidden, 128)
    tensors: dict[str, tuple[str, list[int]]] = {
        "model.embed_tokens.weight": ("BF16", [64, hidden]),
        f"{LAYER}.{BLOCKS.get(family, 'mlp')}.gate.weight": ("BF16", [2, hidden]),
    }
    for name, shape in (routed | linears).items():
        scheme = own.get(name, experts if name in routed else dense)
        if scheme is None:
            tensors[f"{name}.weight"] = ("BF16", list(shape))
        else:
            tensors |= _packed(name, shape, scheme)
    groups = [([name], value) for name, value in own.items()]
    groups.append((["re:.*\\.experts\\.\\d+\\..*"], experts))
    groups += [] if dense is None else [(["Linear"], dense)]
    entry = {
        "quant_method": method,
        "format": form,
        "ignore": ["lm_head"],
        "config_groups": {
            f"group_{i}": {"targets": targets, "weights": _weights(scheme), "format": form}
            for i, (targets, scheme) in enumerate(groups)
        },
    }
    whole = {
        "model_type": family, "hidden_size": hidden, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "num_hidden_layers": 1, "head_dim": size,
        "norm_topk_prob": True, "quantization_config": entry,
    } | config  # fmt: skip
    (folder / "config.json").write_text(json.dumps(whole))
    _write(folder / "model.safetensors", tensors)
    return folder


def _packed(name: str, shape: tuple[int, int], scheme: Form) -> dict[str, tuple[str, list[int]]]:
    (n, k), (bits, group, symmetric) = shape, scheme
    groups = 1 if group == -1 else -(-k // group)
    found = {
        f"{name}.weight_packed": ("I32", [n, -(-k * bits // 32)]),
        f"{name}.weight_scale": ("BF16", [n, groups]),
        f"{name}.weight_shape": ("I64", [2]),
    }
    if not symmetric:
        found[f"{name}.weight_zero_point"] = ("I32", [-(-n * bits // 32), groups])
    return found


def _weights(scheme: Form) -> dict[str, Any]:
    bits, group, symmetric = scheme
    return {
        "num_bits": bits, "type": "int", "symmetric": symmetric,
        "strategy": "channel" if group == -1 else "group",
        "group_size": None if group == -1 else group,
    }  # fmt: skip


def _write(path: Path, tensors: dict[str, tuple[str, list[int]]]) -> None:
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        nbytes = {"BF16": 2, "I32": 4, "I64": 8}[dtype]
        for length in shape:
            nbytes *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    write_header(path, header)
