"""Whole models through the kernels, beside torch's own form on the CPU."""

import pytest
import torch
from helpers import DEVICE, assert_close

import qmoe
import qmoe.packed.load
import qmoe.packed.modules
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.offload import SlotStack

IDS = torch.arange(60, 65)[None]


@pytest.fixture
def through_kernels(monkeypatch):
    """Loads a model that runs through the kernels: on a GPU, or in the interpreter on the CPU."""

    def load(path, **options):
        with monkeypatch.context() as patch:
            if DEVICE.type == "cpu":
                for module in (qmoe.packed.load, qmoe.packed.modules):
                    patch.setattr(module, "uses_arena", lambda device: True)
            return qmoe.load(path, torch.float32, device=DEVICE, progress=False, **options)[0]

    return load


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS.to(model.device)).logits.cpu()


def test_a_model_through_the_kernels_equals_torchs_form(quantized_short, through_kernels):
    plain, _ = qmoe.load(quantized_short, torch.float32, progress=False)
    packed = through_kernels(quantized_short)
    experts = packed.model.layers[0].mlp.experts
    assert experts.qmoe_arena.activation == Activation("silu")
    assert not hasattr(experts, "qmoe_first")
    assert_close(logits(packed), logits(plain))


def test_a_model_with_too_little_memory_for_its_experts(quantized_short, through_kernels):
    whole = through_kernels(quantized_short)
    need = sum(layer.mlp.experts.qmoe_arena.nbytes() for layer in whole.model.layers)
    little = through_kernels(quantized_short, expert_memory=need // 3)
    slots = little.model.layers[0].mlp.experts.qmoe_arena
    assert isinstance(slots, SlotStack) and len(slots.held.pairs) < 16
    assert slots.held.pairs[0][0] >= 0  # warmed by the calibration counts
    plain, _ = qmoe.load(quantized_short, torch.float32, progress=False)
    assert_close(logits(little), logits(plain))
    enough = through_kernels(quantized_short, expert_memory=2 * need)
    assert isinstance(enough.model.layers[0].mlp.experts.qmoe_arena, ArenaStack)
    with pytest.raises(qmoe.QmoeError, match="a token chooses 4; give"):
        through_kernels(quantized_short, expert_memory=need // 40)


def test_expert_memory_without_a_gpu_is_refused(quantized_short):
    with pytest.raises(qmoe.QmoeError, match="of use with a GPU only"):
        qmoe.load(quantized_short, expert_memory=10**9, progress=False)
    with pytest.raises(qmoe.QmoeError, match="device: expected cpu, cuda"):
        qmoe.load(quantized_short, device="tpu", progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(qmoe.QmoeError, match="0 CUDA devices found"):
            qmoe.load(quantized_short, device="cuda", progress=False)
