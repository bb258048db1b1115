"""Prove that exported families are the same models in llama.cpp.

    python -P scripts/gguf_families.py WORK [NAME...] [--keep]

Of every family that `qmoe export --to gguf` knows: a tiny random model is rounded to 4 and 8 bits,
exported, and run in llama.cpp on the same token ids as in qmoe. Expanded to float32, logits must be
equal but for the order of sums; the exit status is 1 if they are not. As it is, llama.cpp's kernels
round the inputs of products, which is shown beside. So is whether llama.cpp makes the same token
ids of a text; then that is asked of every kind of tokenizer that qmoe exports.
"""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import torch
from llama.programs import Llama, expand
from llama.tokenizers_check import check
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import qmoe
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig, Scheme
from qmoe.export.to_gguf import export

DEMO = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo-moe"
HELDOUT = DEMO.parents[2] / "calibration" / "text" / "heldout"
SHOWN = 20000  # characters of each text that are tokenized
TOLERANCE = 1e-5  # relative RMS of logits in float32
COMMON: dict[str, Any] = dict(
    vocab_size=4096, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
    pad_token_id=None, num_hidden_layers=2, hidden_size=256, initializer_range=0.05,
)  # fmt: skip
GROUPED: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2)
FINE: dict[str, Any] = dict(moe_intermediate_size=128, num_experts=8, num_experts_per_tok=2)
LATENT: dict[str, Any] = dict(
    num_attention_heads=4, num_key_value_heads=4, intermediate_size=256, moe_intermediate_size=128,
    n_routed_experts=8, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=128,
    qk_rope_head_dim=32, qk_nope_head_dim=64, v_head_dim=64,
)  # fmt: skip
YARN: dict[str, Any] = dict(
    rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=128
)
OSS: dict[str, Any] = dict(
    **COMMON, **GROUPED, head_dim=64, intermediate_size=256, num_local_experts=8,
    num_experts_per_tok=2, sliding_window=32,
)  # fmt: skip


def configs() -> dict[str, Any]:
    """Every family, and variants that are told otherwise in the file."""
    qwen2 = FINE | {"shared_expert_intermediate_size": 256, "norm_topk_prob": False}
    v2 = LATENT | {"n_shared_experts": 2, "n_group": 1, "topk_group": 1}
    v3 = LATENT | {"n_shared_experts": 1, "q_lora_rank": 64, "n_group": 2, "topk_group": 1}
    mscale = {"mscale": 0.707, "mscale_all_dim": 0.707}
    return {
        "qwen2_moe": Qwen2MoeConfig(**COMMON, **GROUPED, **qwen2),
        "qwen2_moe, tied": Qwen2MoeConfig(**COMMON, **GROUPED, **qwen2, tie_word_embeddings=True),
        "qwen3_moe": Qwen3MoeConfig(**COMMON, **GROUPED, **FINE, head_dim=64, norm_topk_prob=True),
        "qwen3_moe, yarn": Qwen3MoeConfig(
            **COMMON, **GROUPED, **FINE, head_dim=64, norm_topk_prob=True, rope_parameters=YARN
        ),
        "mixtral": MixtralConfig(**COMMON, **GROUPED, intermediate_size=256, num_local_experts=8),
        "olmoe": OlmoeConfig(
            **COMMON, num_attention_heads=4, intermediate_size=256, num_experts=8,
            num_experts_per_tok=2,
        ),
        "deepseek_v2": DeepseekV2Config(**COMMON, **v2, q_lora_rank=64, routed_scaling_factor=1.5),
        "deepseek_v2, yarn": DeepseekV2Config(
            **COMMON, **v2, q_lora_rank=None, rope_parameters=YARN | mscale
        ),
        "deepseek_v3": DeepseekV3Config(**COMMON, **v3),
        "deepseek_v3, yarn": DeepseekV3Config(**COMMON, **v3, rope_parameters=YARN | mscale),
        "gpt_oss": GptOssConfig(**OSS, rope_parameters=YARN | {"truncate": True}),
    }  # fmt: skip


def save_source(config: Any, path: Path) -> None:
    """A random model in bfloat16 with the demo's tokenizer; biases and norms as if trained."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if "bias" in name or "sinks" in name:
            tensor.data.normal_(std=0.1)
        elif "norm" in name:
            tensor.data.normal_(mean=1, std=0.1)
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, path / name)


@torch.no_grad()
def prove(name: str, config: Any, folder: Path, llama: Llama, text: str) -> bool:
    """Print a row for a family; returns whether the models are the same."""
    source, packed, file = folder / "source", folder / "packed", folder / "packed.gguf"
    save_source(config, source)
    rounded = QuantConfig(
        method="rtn", search_grid=False, refit=False, experts=Scheme(4, 32), dense=Scheme(8, 32)
    )
    qmoe.quantize(source, packed, rounded, progress=False)
    export(ModelFolder(packed), file, progress=False)
    expand(file, folder / "plain.gguf")
    ids = torch.randint(1, 4000, (2, 96), generator=torch.Generator().manual_seed(0))
    model, tokenizer = qmoe.load(packed, torch.float32, progress=False, cache=False)
    ours = model(input_ids=ids).logits
    off = _off(torch.stack([*llama.logits_of(folder / "plain.gguf", ids, 4096)]), ours)
    as_it_is = _off(torch.stack([*llama.logits_of(file, ids, 4096)]), ours)
    same = llama.token_ids(file, text) == tokenizer(text, add_special_tokens=False)["input_ids"]
    good = off <= TOLERANCE and same
    words = "same tokens" if same else "OTHER TOKENS"
    told = f"{name:18} in float32 {off:.1e}, as it is {as_it_is:.1e}, {words}"
    print(told, "" if good else "FAILED", flush=True)
    return good


def _off(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--keep", action="store_true", help="keep models and files")
    args = parser.parse_args()
    llama = Llama.find(args.work)
    text = "\n".join(path.read_text()[:SHOWN] for path in sorted(HELDOUT.glob("*.txt")))
    known, results = configs(), []
    for name in args.names or known:
        folder = args.work / "families" / name.replace(", ", "-")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        results.append(prove(name, known[name], folder, llama, text))
        if not args.keep:
            shutil.rmtree(folder)
    print(f"{sum(results)} of {len(results)} are the same model in llama.cpp")
    tokenizers = check(llama, args.work, text)
    print(f"{sum(tokenizers)} of {len(tokenizers)} kinds of tokenizers are the same")
    return 0 if all(results + tokenizers) else 1


if __name__ == "__main__":
    sys.exit(main())
