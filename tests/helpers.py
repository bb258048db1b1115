"""Tiny random models, MoE inputs, and the one tolerance."""

import filecmp
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from qmoe import CalibrationConfig, QuantConfig
from qmoe.calibration.pieces import Reading, choose, slices
from qmoe.calibration.text import Texts
from qmoe.config import CHANNEL
from qmoe.format.compressed_tensors import packed_tensors
from qmoe.format.grid import dequantize
from qmoe.format.packing import StoredWords
from qmoe.pipeline.output import OutputFolder, Shard

# Where the kernels' tests run them: on the CPU in Triton's interpreter, or compiled on a GPU.
DEVICE = torch.device(os.environ.get("QMOE_TEST_DEVICE", "cpu"))

ONE_DOMAIN = "bundled:austen"  # where any text does: tokenizing all of them takes a second

LITTLE_TEXT = CalibrationConfig(ONE_DOMAIN, samples=4, seqlen=128, self_samples=0)
QUICK = QuantConfig(search_grid=False, calibration=LITTLE_TEXT)

BASE = dict(
    vocab_size=4096,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
    pad_token_id=None,
)
FAMILIES: dict[str, Any] = {
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **BASE, head_dim=16, moe_intermediate_size=32, num_experts=6, num_experts_per_tok=2
    ),
    "mixtral": lambda: MixtralConfig(
        **BASE, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen2_moe": lambda: Qwen2MoeConfig(
        **BASE,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=5,
        num_experts_per_tok=2,
    ),
    "olmoe": lambda: OlmoeConfig(
        **{**BASE, "num_key_value_heads": 4},
        intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "gpt_oss": lambda: GptOssConfig(
        **BASE, head_dim=16, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**BASE, "num_key_value_heads": 4},
        intermediate_size=96,
        moe_intermediate_size=32,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        q_lora_rank=32,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
    ),
}


def save_random(
    family: str, path: Path, tokenizer: Path, dtype: torch.dtype, **changes: Any
) -> Path:
    """A random model of a family with the demo's tokenizer, saved as its authors would."""
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config = type(config).from_dict(config.to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:  # default initialization is so small that routing is a tie
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            elif "bias" in name:
                parameter.normal_(std=0.1)
            elif "norm" in name:  # features of very different size, as trained norms make them
                parameter.normal_().exp_()
    model.save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, path / name)
    return path


def first_layers(model: Path, path: Path, count: int) -> Path:
    """The first layers of a trained model: as real as the whole, in part of its time."""
    shutil.copytree(model, path)
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": count}
    (path / "config.json").write_text(json.dumps(config))
    later = tuple(f"model.layers.{i}." for i in range(count, 100))
    tensors = load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(later)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


def same_files(a: Path, b: Path) -> bool:
    """Whether two folders hold files of the same names and bytes."""
    names = sorted(p.name for p in a.iterdir())
    assert names and names == sorted(p.name for p in b.iterdir())
    return filecmp.cmpfiles(a, b, names, shallow=False) == (names, [], [])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Make runs in this process stop as by Ctrl-C after that many shards."""
    original = OutputFolder.write_shard

    def write(self: OutputFolder, shard: Shard) -> None:
        if shard.index == shards:
            raise KeyboardInterrupt
        original(self, shard)

    monkeypatch.setattr(OutputFolder, "write_shard", write)


def slow(*values: Any) -> Any:
    """One case of a test that `make test` leaves to `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)


def mostly_slow(cases: Sequence[tuple[Any, ...]], quick: Callable[..., bool]) -> list[Any]:
    """Parameters of a test of which only those that `quick(*case)` names are run by `make test`."""
    chosen = [quick(*case) for case in cases]
    assert any(chosen), "nothing is left"
    return [
        pytest.param(*case) if now else slow(*case) for case, now in zip(cases, chosen, strict=True)
    ]


def assert_close(actual: Tensor, expected: Tensor, most: float = 1e-4, rms: float = 2e-5) -> None:
    """Errors relative to max(|expected|, its RMS): the largest and their RMS must be small."""
    assert actual.shape == expected.shape
    actual, expected = actual.double(), expected.double()
    floor = expected.square().mean().sqrt() + 1e-12
    error = (actual - expected).abs() / expected.abs().clamp(min=float(floor))
    assert error.isfinite().all(), "not finite"
    worst, mean = float(error.max()), float(error.square().mean().sqrt())
    assert worst <= most and mean <= rms, f"largest {worst:.2e} (of {most:.0e}), RMS {mean:.2e}"


def whole(texts: Texts) -> dict[str, str]:
    """All text by domain, messages as their contents."""
    found = {}
    for domain, parts in texts.domains.items():
        chosen, _ = choose(parts, 10**12, Reading(0))
        found[domain] = "".join(slices(chosen, lambda chat: "|".join(m["content"] for m in chat)))
    return found


def moe_inputs(T: int, A: int, E: int, H: int, I: int) -> tuple[Tensor, ...]:  # noqa: E741
    """x [T, H], ids [T, A], gates [T, A], first [E, 2I, H], second [E, H, I]; weight-like scales.

    Expert E-1 gets no token, and where T allows it expert E-2 gets exactly one.
    """
    x = torch.randn(T, H)
    ids = torch.stack([torch.randperm(max(E - 2, A))[:A] for _ in range(T)])
    if T > 1 and E > A + 1:
        ids[0, 0] = E - 2
    gates = torch.rand(T, A)
    first = torch.randn(E, 2 * I, H) * H**-0.5
    second = torch.randn(E, H, I) * I**-0.5
    return x, ids, gates, first, second


def second_matrix(experts: Any, e: int) -> Tensor:
    """The second matrix of expert e of a packed experts module, expanded."""
    if hasattr(experts, "qmoe_arena"):
        return experts.qmoe_arena.expand(e, 1)
    return experts.qmoe_second.expand(e)


def stored(
    bits: int = 4,
    group: int = 128,
    symmetric: bool = True,
    n: int = 24,
    k: int = 256,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The stored tensors of a random matrix [n, k], by suffix."""
    torch.manual_seed(seed)
    half, groups = 1 << (bits - 1), 1 if group == CHANNEL else k // group
    q = torch.randint(-half, half, (n, k), dtype=torch.int8)
    zero = None if symmetric else torch.randint(-half, half, (n, groups), dtype=torch.int8)
    scale = torch.rand(n, groups) + 0.1
    tensors = packed_tensors("weight", q, scale, zero, bits)
    return {name.removeprefix("weight"): tensor for name, tensor in tensors.items()}


def weight(words: StoredWords) -> Tensor:
    """The first matrix of a stack, in floating point."""
    made: Tensor = dequantize(words.unpack())[0]
    return made
