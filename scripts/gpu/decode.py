"""A few layers of Qwen3-30B-A3B with random weights, end to end: decode tokens/s with CUDA graphs,
packed and in bfloat16, the share of read bandwidth, and where the time goes."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import qmoe
from gpu.clock import in_turn, read_bandwidth
from gpu.generate import Stepper
from gpu.random_packed import write_packed
from gpu.record import Record

PARTS = {
    "experts": ("grouped_gemm", "sum_contributions", "place_assignments", "count_assignments"),
    "routing": ("topk", "softmax", "sort", "Softmax", "TopK", "radix"),
    "attention": ("flash", "fmha", "attention", "index_copy", "cat", "index_put"),
}


def qwen(layers: int, toy: bool) -> Qwen3MoeConfig:
    sizes: dict[str, Any] = dict(
        vocab_size=151_936, hidden_size=2048, num_attention_heads=32, num_key_value_heads=4,
        head_dim=128, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    if toy:
        sizes = dict(
            vocab_size=512, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
            head_dim=32, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        )  # fmt: skip
    return Qwen3MoeConfig(
        num_hidden_layers=layers, norm_topk_prob=True, max_position_embeddings=4096,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=None, **sizes,
    )  # fmt: skip


def end_to_end(
    record: Record, device: torch.device, folder: Path, layers: int, batches: tuple[int, ...]
) -> None:
    """Rows per batch size: tokens/s packed and in 16 bits, and microseconds by part."""
    toy = device.type == "cpu"
    config = qwen(layers, toy)
    packed = write_packed(folder / f"qwen-{layers}", config, bits=4)
    dtype = torch.float32 if toy else torch.bfloat16
    ours, _ = qmoe.load(packed, dtype, device=str(device), progress=False)
    peak = read_bandwidth(device)
    runs: dict[tuple[str, int], Callable[[], Any]] = {}
    steppers = []
    with device:
        torch.manual_seed(0)
        config._experts_implementation = "grouped_mm"
        theirs = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, model in (("qmoe", ours), ("bf16", theirs)):
        for sequences in batches:
            prompt = torch.randint(config.vocab_size, (sequences, 32), device=device)
            stepper = Stepper(model, prompt, 96)
            steppers.append(stepper)
            runs[name, sequences] = stepper.ready(graph=True)
    for sequences in batches:
        pair = {name: runs[name, sequences] for name in ("qmoe", "bf16")}
        seconds = in_turn(pair, 20 if not toy else 2, device)
        read = bytes_read(config, sequences)
        record.row(
            layers=layers, batch=sequences,
            **{f"{name}_tokens_per_s": sequences / s for name, s in seconds.items()},
            times_bf16=seconds["bf16"] / seconds["qmoe"],
            share_of_read=read / seconds["qmoe"] / peak, **parts(runs["qmoe", sequences], device),
        )  # fmt: skip
    del ours, theirs, runs, steppers
    gc.collect()


def bytes_read(config: Qwen3MoeConfig, sequences: int) -> float:
    """Bytes of packed weights that a step reads: 4 bits with a 16-bit scale per 128, the rest of
    the linears in 8 bits; the experts in use, if routing is even."""
    E, A = config.num_experts, config.num_experts_per_tok
    used = E * (1 - (1 - A / E) ** sequences)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = used * expert * (4 / 8 + 2 / 128) + heads * config.hidden_size
    return config.num_hidden_layers * layer + config.vocab_size * config.hidden_size


def parts(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Microseconds of a step by what kernels are called."""
    if device.type == "cpu":
        return {}
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(5):
            run()
        torch.cuda.synchronize()
    spent = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in seen.key_averages():
        part = next((p for p, words in PARTS.items() if any(w in event.key for w in words)), "rest")
        spent[part] += event.device_time_total / 5
    return {f"{part}_us": us for part, us in spent.items()}
