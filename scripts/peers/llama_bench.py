"""llama.cpp's speed on a model of the same shapes: llama-bench on a GGUF with random Q4_0 blocks.

llama-bench is built into this environment on the first run (llama_build.py). Speed depends on the
shapes and on nothing that is in the blocks. The vocabulary has no words ("no_vocab"): llama-bench
feeds token ids. Prints where llama-bench and the GGUF are, as JSON.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from llama_build import program

Q4_0 = (32, 18)  # weights of a block, and its bytes: a float16 scale and 16 bytes of nibbles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path, help="config.json of a Qwen3-MoE or a Mixtral")
    parser.add_argument("out", type=Path, help="the GGUF to write, unless it is there")
    parser.add_argument("--avx2", action="store_true", help="for processors with AVX2 alone")
    args = parser.parse_args()
    if not args.out.is_file():
        write(json.loads(args.config.read_text()), args.out)
    made = program("llama-bench", args.avx2)
    print(json.dumps({"llama_bench": str(made), "gguf": str(args.out)}))


def blocks(*shape: int) -> np.ndarray:
    """Random Q4_0 blocks of a tensor [..., K], as bytes [..., K / 32 * 18], of scale 1 / K."""
    *outer, k = shape
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (*outer, k // Q4_0[0], Q4_0[1]), dtype=np.uint8)
    data[..., :2] = np.frombuffer(np.float16(1 / k).tobytes(), dtype=np.uint8)
    return data.reshape(*outer, -1)


def write(config: dict[str, Any], path: Path) -> None:
    """Write the GGUF of a config."""
    mixtral = config["model_type"] == "mixtral"
    H, V, L = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
    heads, kv = config["num_attention_heads"], config["num_key_value_heads"]
    size = config.get("head_dim") or H // heads
    inner = config["intermediate_size" if mixtral else "moe_intermediate_size"]
    E = config["num_local_experts" if mixtral else "num_experts"]
    w = GGUFWriter(path, "llama" if mixtral else "qwen3moe")
    w.add_vocab_size(V)
    w.add_tokenizer_model("no_vocab")
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(H)
    w.add_block_count(L)
    w.add_feed_forward_length(inner)
    w.add_expert_feed_forward_length(inner)
    w.add_head_count(heads)
    w.add_head_count_kv(kv)
    w.add_key_length(size)
    w.add_value_length(size)
    w.add_rope_dimension_count(size)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_rope_freq_base(1e6)
    w.add_expert_count(E)
    w.add_expert_used_count(config["num_experts_per_tok"])
    w.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)

    def packed(name: str, *shape: int) -> None:
        w.add_tensor(f"{name}.weight", blocks(*shape), raw_dtype=Type.Q4_0)

    def plain(name: str, *shape: int) -> None:
        random = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
        w.add_tensor(f"{name}.weight", np.ones(shape, np.float32) if len(shape) == 1 else random)

    packed("token_embd", V, H)
    packed("output", V, H)
    plain("output_norm", H)
    for i in range(L):
        at = f"blk.{i}"
        plain(f"{at}.attn_norm", H)
        plain(f"{at}.ffn_norm", H)
        if not mixtral:
            plain(f"{at}.attn_q_norm", size)
            plain(f"{at}.attn_k_norm", size)
        packed(f"{at}.attn_q", heads * size, H)
        packed(f"{at}.attn_k", kv * size, H)
        packed(f"{at}.attn_v", kv * size, H)
        packed(f"{at}.attn_output", H, heads * size)
        plain(f"{at}.ffn_gate_inp", E, H)
        packed(f"{at}.ffn_gate_exps", E, inner, H)
        packed(f"{at}.ffn_up_exps", E, inner, H)
        packed(f"{at}.ffn_down_exps", E, H, inner)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


if __name__ == "__main__":
    main()
