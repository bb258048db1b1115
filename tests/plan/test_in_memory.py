"""What weights are said to take in memory, beside the storages of loaded models."""

import pytest
import torch
from helpers import mostly_slow, save_random

import qmoe
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, QuantConfig, Scheme
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.cpu.library import tier
from qmoe.model.source import open_source
from qmoe.plan.in_memory import _on_cpu, _on_gpu, in_memory
from qmoe.plan.sizes import Stack, stacks
from qmoe.solvers.rtn import rtn

CPU = torch.device("cpu")
QUICK_MODELS = [("mixtral", 4), ("gpt_oss", 2), ("deepseek_v3", 3), ("qwen2_moe", 4)]


def resident(model):
    """Bytes of all storages, each once: a tied head is there once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
    )


@pytest.mark.skipif(tier() is None, reason="the C kernels are not installed")
@pytest.mark.parametrize(
    "family, experts, lm_head, tied",
    mostly_slow(
        [
            (family, *kind)
            for family in ("mixtral", "gpt_oss", "deepseek_v3", "qwen2_moe")
            for kind in (
                (Scheme(4, 32), None, True),
                (Scheme(3, 32, False), Scheme(8, CHANNEL), False),
                (Scheme(2, CHANNEL), None, False),
            )
        ],
        lambda family, experts, *_: (family, experts.bits) in QUICK_MODELS,
    ),
)
def test_a_loaded_model_takes_what_was_said(demo, tmp_path, family, experts, lm_head, tied):
    source = save_random(family, tmp_path / "m", demo, torch.bfloat16, tie_word_embeddings=tied)
    config = QuantConfig(method="rtn", experts=experts, lm_head=lm_head)
    opened = open_source(ModelFolder.find(source), torch.float32)
    found = in_memory(opened, config, stacks(opened, config), gpu=False)
    qmoe.quantize(source, tmp_path / "q", config, progress=False)
    model, _ = qmoe.load(tmp_path / "q", progress=False)
    head = 0 if found.head is None else found.head.nbytes
    told = sum(module.nbytes for module in found.packed) + head
    told += found.embeddings + found.lm_head + found.other
    buffers = sum(b.nbytes for n, b in model.named_buffers() if "rotary" in n)
    real = resident(model) - buffers
    # Rows that do not alternate are not padded twice, and routers that are float32 at run time.
    assert real * 0.99 <= told <= real * 1.02


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("H, I", [(128, 64), (160, 96), (96, 352), (256, 704)])
def test_an_arena_takes_what_was_said(bits, symmetric, H, I):  # noqa: E741
    scheme, E = Scheme(bits, 32, symmetric), 3
    made = [rtn(torch.randn(E, *s), scheme, torch.float32) for s in ((2 * I, H), (H, I))]
    stack = ArenaStack(made, torch.float32, CPU, Activation("silu"), paired=True)
    parts = [
        Stack("experts.gate_up_proj", "layers.0", (E, 2 * I, H), 2, scheme, True),
        Stack("experts.down_proj", "layers.0", (E, H, I), 1, scheme, True),
    ]
    integers, scales = _on_gpu(parts, torch.float32)
    assert E * (integers + scales) == stack.buffer.nbytes
    assert E * integers == stack.packed_bytes()
    first, length = stack.arena.expert_range(1)
    assert length == integers + scales


def test_by_hand():
    """An expert of 256 x 256 and 256 x 128 in 4 bits, groups of 128, scales of two bytes. On a CPU
    each 16 rows have their scales in whole lines of 64 bytes."""
    scheme = Scheme(4, 128)
    parts = [Stack("e.up_proj", "layers.0", (5, 256, 256), 1, scheme, True)]
    parts.append(Stack("e.down_proj", "layers.0", (5, 256, 128), 1, scheme, True))
    integers, scales = 256 * 256 // 2 + 256 * 128 // 2, 2 * (256 * 2 + 256 * 1)
    assert _on_cpu(parts, torch.bfloat16) == (integers, 2 * 16 * 64)
    assert _on_gpu(parts, torch.bfloat16) == (integers, scales)


def test_three_bits_of_an_odd_width():
    """40 rows of 160 are padded to whole words on disk, to 48 rows on a CPU, and on a GPU to 128
    rows, where the five steps of 32 that are left of 256 take three planes."""
    part = Stack("w.weight", "layers.0", (1, 40, 160), 1, Scheme(3, 32), False)
    assert part.weights == 40 * 15 * 4  # 480 bits are 15 words
    assert _on_cpu([part], torch.bfloat16)[0] == 48 * 160 * 3 // 8
    assert _on_gpu([part], torch.bfloat16)[0] == 128 * 32 * 3
