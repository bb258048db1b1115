"""Write a model of any shape with random weights, to measure memory and speed at real sizes.

    python scripts/random_model.py OUT --hidden 1024 --experts 64 --intermediate 512 --layers 4
    python scripts/random_model.py OUT --like Qwen3-30B-A3B --layers 4

Its predictions mean nothing. The demo model's tokenizer comes with it, and its vocabulary.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

DEMO = Path(__file__).resolve().parents[1] / "tests" / "data" / "demo-moe"
COMMON = dict(
    vocab_size=4096, max_position_embeddings=4096, bos_token_id=0, eos_token_id=0,
    pad_token_id=None,
)  # fmt: skip
LIKE: dict[str, Any] = {
    "Qwen3-30B-A3B": Qwen3MoeConfig(
        **COMMON, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
    ),
    "Mixtral-8x7B": MixtralConfig(
        **COMMON, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
        intermediate_size=14336, num_local_experts=8, num_experts_per_tok=2,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", choices=LIKE, help="shapes of a model that people run")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--intermediate", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    config = LIKE[args.like] if args.like else _qwen3_moe(args)
    config.num_hidden_layers = args.layers
    config.layer_types = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict()), dtype=torch.bfloat16)
    model.save_pretrained(args.out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, args.out / name)


def _qwen3_moe(args: argparse.Namespace) -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        **COMMON, hidden_size=args.hidden, num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 256), head_dim=64,
        moe_intermediate_size=args.intermediate, num_experts=args.experts,
        num_experts_per_tok=args.top_k, norm_topk_prob=True, tie_word_embeddings=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
