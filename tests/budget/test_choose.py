"""Widths for a number of bytes, on made-up measurements of a real model."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import mostly_slow

import qmoe
from qmoe.budget.choose import all_in, choose, uniform
from qmoe.budget.curve import curve
from qmoe.budget.measurements import Measured, Measurements
from qmoe.budget.memory import Disk, Gpu, average_bits, bytes_for
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.model.schemes import with_widest
from qmoe.model.source import open_source
from qmoe.plan.in_memory import expert_sizes
from qmoe.plan.sizes import Stack, stacks

SCHEME = Scheme(4, 64, symmetric=False)
BASE = QuantConfig(experts=SCHEME, dense=SCHEME)


@pytest.fixture(scope="module")
def source(demo):
    return open_source(ModelFolder.find(demo), torch.float32)


@pytest.fixture(scope="module")
def measurements(source):
    """Errors fall fourfold with each bit and are half as large again without groups, and experts
    differ in how much they matter."""
    rng = np.random.default_rng(0)
    parts, kl = [], {}
    for stack in stacks(source, BASE):
        name = stack.module if stack.name.endswith(".weight") else stack.name
        E = stack.shape[0]
        matters = rng.gamma(0.5, size=E)
        grouped = 0.1 * matters[:, None] * 4.0 ** -np.arange(4)
        errors = np.concatenate([grouped, 1.5 * grouped], axis=1).tolist()
        tokens = rng.integers(0, 5000, E).tolist()
        parts.append(Measured(name, stack.layer, name, tokens, errors, [1.0] * E))
        kl[name] = float(rng.gamma(1.0))
    return Measurements({}, parts, kl)


TEN = [2.3, 2.5, 2.8, 3.0, 3.2, 3.6, 4.0, 5.0, 6.5, 7.9]


@pytest.mark.parametrize("bits", TEN)
def test_a_budget_is_kept_and_filled(source, measurements, bits):
    budget = bytes_for(source, BASE, bits)
    chosen = choose(Disk(source), BASE, measurements, budget)
    assert chosen.nbytes == Disk(source).total(chosen.config)
    assert 0.99 * budget <= chosen.nbytes <= budget
    assert bits - 0.05 < average_bits(source, chosen.config) <= bits


@pytest.mark.parametrize("bits", TEN)
def test_a_gpus_memory_is_kept_and_filled(source, measurements, bits):
    """Bytes as the kernels lay out the chosen widths and groups, beside all else that counts."""
    memory = Gpu(source, 256)
    scheme = replace(SCHEME, bits=4)
    config = replace(BASE, experts=scheme, dense=scheme)

    def laid_out(config):
        modules: dict[str, list[Stack]] = {}
        for part in stacks(source, config):
            modules.setdefault(part.module, []).append(part)
        dtype = source.weight_dtype()
        return sum(sum(expert_sizes(parts, dtype)) for parts in modules.values())

    rest = memory.total(config) - laid_out(config)
    budget = rest + int(laid_out(config) * bits / 4)
    chosen = choose(memory, config, measurements, budget)
    assert chosen.nbytes == rest + laid_out(chosen.config)
    assert 0.99 * budget < chosen.nbytes <= budget


@pytest.mark.parametrize(
    "bits", mostly_slow([(bits,) for bits in TEN], lambda bits: bits in (2.3, 7.9))
)
def test_the_files_are_as_large_as_planned(source, measurements, demo, tmp_path, bits):
    budget = bytes_for(source, BASE, bits)
    config = replace(choose(Disk(source), BASE, measurements, budget).config, method="rtn",
                     search_grid=False, refit=False)  # fmt: skip
    qmoe.quantize(demo, tmp_path / "out", config, progress=False)
    found = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.99 * budget < found <= budget


def test_more_bytes_never_cost_more(source, measurements):
    budgets = [bytes_for(source, BASE, bits) for bits in (2.3, 2.6, 3, 4, 5, 7)]
    costs = [choose(Disk(source), BASE, measurements, budget).predicted for budget in budgets]
    assert costs == sorted(costs, reverse=True) and costs[0] > 10 * costs[-1]


def test_the_curve_falls_from_the_fewest_bits_to_the_most(source, measurements):
    found = curve(Disk(source), BASE, measurements)
    two = replace(SCHEME, bits=2)
    assert found[0]["bits"] <= average_bits(source, replace(BASE, experts=two, dense=two))
    for a, b in pairwise(found):
        assert a["bytes"] < b["bytes"] and a["bits"] < b["bits"]
        assert a["predicted_kl"] > b["predicted_kl"]
    chosen = choose(Disk(source), BASE, measurements, int(found[3]["bytes"]))
    assert chosen.predicted == pytest.approx(found[3]["predicted_kl"], rel=0.02)  # headers vary


def test_matrices_that_matter_more_get_no_fewer_bits(source, measurements):
    config = choose(Disk(source), BASE, measurements, bytes_for(source, BASE, 3)).config
    for part in measurements.parts:
        if len(part.tokens) > 1:
            weights = part.weights(np.mean(part.tokens)) * np.asarray(part.errors)[:, 0]
            digits = [int(digit) for digit in config.widths[part.target]]
            ordered = [digits[e] for e in np.argsort(weights)]
            assert ordered == sorted(ordered)


def test_the_experts_of_a_layer_have_one_group_size(source, measurements):
    """Some get none at a small budget, and vLLM's keep those of the settings."""
    budget = bytes_for(source, BASE, 2.25)
    config = choose(Disk(source), BASE, measurements, budget).config
    experts = {name for layer in source.structure.layers for name in layer.experts}
    assert experts & set(config.groups) and set(config.groups.values()) == {CHANNEL}
    assert Disk(source).total(config) <= budget
    vllm = choose(Disk(source), replace(BASE, target="vllm"), measurements, budget + 100_000)
    assert not vllm.config.groups


def test_vllm_gets_one_width_for_a_layer(source, measurements):
    base = replace(BASE, target="vllm")
    config = choose(Disk(source), base, measurements, bytes_for(source, base, 3.1)).config
    digits: dict[str, set[str]] = {}
    for name, each in config.widths.items():
        place = name.split(".mlp.")[0] if ".experts" in name else name.rpartition(".")[0]
        digits.setdefault(place, set()).update(each)
    assert all(len(found) == 1 for found in digits.values())
    assert len(set(map(str, digits.values()))) > 1


def test_the_uniform_rival_is_the_widest_that_fits(source):
    three = replace(BASE, experts=replace(SCHEME, bits=3), dense=replace(SCHEME, bits=3))
    size = Disk(source).total(three)
    found = uniform(Disk(source), BASE, size)
    assert found is not None and found.experts == found.dense == three.experts
    less = uniform(Disk(source), BASE, size - 1)
    assert less is not None and less.experts != three.experts
    assert uniform(Disk(source), BASE, size // 10) is None


def test_a_budget_that_nothing_fits_is_refused(source, measurements):
    narrow = Scheme(2, CHANNEL, symmetric=False)
    least = Disk(source).total(replace(BASE, experts=narrow, dense=narrow))
    choose(Disk(source), BASE, measurements, least + 100)
    with pytest.raises(ConfigError, match=f"takes {least} bytes, which is 5 more"):
        choose(Disk(source), BASE, measurements, least - 5)


def test_bytes_on_a_gpu_are_what_the_plan_counts(source, measurements):
    """Sums over matrices, beside the model's placement in one width."""
    memory = Gpu(source, 256)
    for bits in (2, 3, 4, 8):
        scheme = replace(SCHEME, bits=bits)
        config = replace(BASE, experts=scheme, dense=scheme)
        budget = memory.total(config)
        chosen = choose(memory, config, measurements, budget)
        assert 0.999 * budget < chosen.nbytes <= budget
    narrow = Scheme(2, CHANNEL, symmetric=False)
    least = memory.total(replace(BASE, experts=narrow, dense=narrow))
    chosen = choose(memory, BASE, measurements, least)
    assert chosen.nbytes == least  # since there is no other choice
    assert {digit for each in chosen.config.widths.values() for digit in each} == {"2"}
    assert set(chosen.config.groups) == {part.module for part in stacks(source, BASE)}


def test_a_uniform_model_for_llama_cpp_is_counted_with_the_bits_of_its_blocks(source):
    """Of the demo's matrices none has inputs that fill a block of 2 bits, so they get 4."""
    scheme = Scheme(4, 32)
    config = QuantConfig(experts=scheme, dense=scheme, target="llama.cpp")
    found = uniform(Disk(source), config, bytes_for(source, BASE, 8))
    assert found is not None and with_widest(source, found)[0] == found
    two = all_in(config, replace(scheme, bits=2))
    wide, notes = with_widest(source, two)
    assert notes and Disk(source).total(wide) > Disk(source).total(two)
    budget = Disk(source).total(two)  # too little for the bits of its blocks
    assert uniform(Disk(source), config, budget) is None
