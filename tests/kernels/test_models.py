"""Whole models through the kernels, beside torch's own form on the CPU."""

from dataclasses import replace

import pytest
import torch
from helpers import DEVICE, assert_close, save_random, slow

import qmoe
import qmoe.packed.fill
import qmoe.packed.load
import qmoe.plan.run_plan
import qmoe.runtime.modules
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig, Scheme
from qmoe.kernels.activation import Activation
from qmoe.kernels.arena_stack import ArenaStack
from qmoe.kernels.hosted.hybrid import AT_ONCE, HybridStack
from qmoe.kernels.hosted.placement import hit_rate
from qmoe.kernels.hosted.slots import SlotStack
from qmoe.model.source import open_source
from qmoe.plan.choose import measure
from qmoe.plan.in_memory import in_memory
from qmoe.plan.placement import Budget, Load, place
from qmoe.plan.run_plan import RunPlan
from qmoe.plan.sizes import stacks
from qmoe.runtime.gradients import Placeholder
from qmoe.runtime.offload import calibration_counts

IDS = torch.arange(60, 65)[None]
FREE = 10**9  # bytes of the device's memory


@pytest.fixture
def through_kernels(monkeypatch):
    """Loads a model that runs through the kernels: on a GPU, or in the interpreter on the CPU."""

    def load(path, **options):
        with monkeypatch.context() as patch:
            if DEVICE.type == "cpu":
                for module in (qmoe.packed.load, qmoe.packed.fill, qmoe.runtime.modules):
                    patch.setattr(module, "uses_arena", lambda device: True)
                patch.setattr(qmoe.plan.run_plan, "free_on", lambda device: FREE)
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


@pytest.mark.slow
def test_gradients_through_the_kernels_layout_equal_torchs_form(quantized_short, through_kernels):
    plain, _ = qmoe.load(quantized_short, torch.float32, progress=False)
    found = []
    for model in (through_kernels(quantized_short), plain):
        x = model.get_input_embeddings()(IDS.to(model.device)).detach().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().mean().backward()
        found.append(x.grad.cpu())
    assert_close(*found)


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


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", slow("deepseek_v3")])
def test_slots_are_as_planned(demo, tmp_path, through_kernels, family):
    """The number of slots, and the bytes of all that lies on the device, to the byte."""
    folder = save_random(family, tmp_path / "m", demo, torch.float32)
    config = QuantConfig(method="rtn", experts=Scheme(4, 32))
    source = open_source(ModelFolder.find(folder), torch.float32)
    weights = in_memory(source, config, stacks(source, config), gpu=True)
    # More for the CPU than any host memory has, so that experts wait in slots.
    weights = replace(weights, packed=[replace(m, on_cpu=10**15) for m in weights.packed])
    load = Load(measure(source, 64), 0, 1)
    largest = place(weights, load, Budget(10**12, 10**12)).total()[0]
    placed = place(weights, load, Budget(largest - 5_000, 10**12))
    assert 2 < placed.slots < weights.routed[0].experts and placed.fits
    qmoe.quantize(folder, tmp_path / "q", config, progress=False)
    model = through_kernels(tmp_path / "q", expert_memory=placed.expert_memory)
    held = [m for m in model.modules() if isinstance(m, SlotStack)]
    assert held and {len(stack.held.pairs) for stack in held} == {placed.slots}
    told = sum(
        part.gpu
        for part in placed.parts
        if not part.name.startswith(("CUDA", "cache", "activations", "workspace", "margin"))
    )
    storages = [
        t.untyped_storage()
        for name, t in (*model.named_parameters(), *model.named_buffers())
        if "rotary" not in name and type(t) is not Placeholder  # one number each
    ]
    assert told == sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    fewer = through_kernels(tmp_path / "q", expert_memory=placed.expert_memory - 1)
    stack = next(m for m in fewer.modules() if isinstance(m, SlotStack))
    assert len(stack.held.pairs) == placed.slots - 1


def hybrids(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, HybridStack)}


def test_a_plan_leaves_experts_to_the_cpu_that_the_gpu_has_no_room_for(
    quantized_short, through_kernels, tmp_path
):
    """Hot ones are those of most calibration tokens, in one ranking over the layers."""
    whole = through_kernels(quantized_short)
    names = [f"model.layers.{i}.mlp.experts" for i in range(len(whole.model.layers))]
    each = {name: whole.get_submodule(name).qmoe_arena.arena.ranges() for name in names}
    largest = max(length for ranges in each.values() for _, length in ranges)
    memory = (2 * AT_ONCE + 7) * largest
    plan = RunPlan(10**9, 10**9, 64, 1, 10**6, 10**6, memory, True)
    plan.write(tmp_path / "plan.json")
    model = through_kernels(quantized_short, plan=tmp_path / "plan.json")
    found = {n.removesuffix(".qmoe_arena"): m for n, m in hybrids(model).items()}
    assert list(found) == names
    hot = {name: stack.ids["hot"] for name, stack in found.items()}
    counts = calibration_counts(quantized_short)
    ranked = sorted((-counts[n][e], e, n) for n in names for e in range(len(counts[n])))
    assert sum(map(len, hot.values())) == 7
    least = min(counts[n][e] for n in names for e in hot[n])
    assert -ranked[6][0] == least
    plain, _ = qmoe.load(quantized_short, torch.float32, progress=False)
    assert_close(logits(model), logits(plain))
    stack = found[names[0]]
    assert stack.hits + stack.misses == IDS.numel() * 4
    assert stack.how.staging.rates.known.startswith("measured")
    assert 0 < hit_rate(counts, hot) < 1


def test_a_plan_that_cannot_be_kept_is_refused(quantized_short, through_kernels, tmp_path):
    plan = RunPlan(10**9, 10**9, 64, 1, 10**6, 10**6, 5 * 10**5, True)
    asked = dict(plan=tmp_path / "plan.json")
    for change, message in (
        ({"gpu": FREE + 77}, "of GPU memory, which is 77 bytes more than the 1.00 GB"),
        ({"host": 10**15}, "of host memory, which is .* bytes more than the"),
        ({"vram": None}, "the plan is for a CPU"),
        ({"expert_memory": 10}, "do not hold the slots through which"),
    ):
        replace(plan, **change).write(tmp_path / "plan.json")
        with pytest.raises(qmoe.QmoeError, match=message):
            through_kernels(quantized_short, **asked)
    with pytest.raises(qmoe.QmoeError, match="leave out one of them"):
        through_kernels(quantized_short, expert_memory=10**6, **asked)
    with pytest.raises(qmoe.QmoeError, match="there is no plan; `qmoe quantize --vram` writes one"):
        qmoe.load(quantized_short, plan=True, progress=False)


def test_expert_memory_without_a_gpu_is_refused(quantized_short):
    with pytest.raises(qmoe.QmoeError, match="of use with a GPU only"):
        qmoe.load(quantized_short, expert_memory=10**9, progress=False)
    with pytest.raises(qmoe.QmoeError, match="device: expected cpu, cuda"):
        qmoe.load(quantized_short, device="tpu", progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(qmoe.QmoeError, match="0 CUDA devices found"):
            qmoe.load(quantized_short, device="cuda", progress=False)
