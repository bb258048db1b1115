"""Widths for a number of bytes, on made-up measurements of a real model."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import qmoe
from qmoe.budget.choose import choose, uniform
from qmoe.budget.curve import curve
from qmoe.budget.measurements import Measured, Measurements
from qmoe.budget.memory import Disk, Gpu, average_bits, bytes_for
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.model.source import open_source
from qmoe.plan.sizes import stacks

SCHEME = Scheme(4, 64, symmetric=False)
BASE = QuantConfig(experts=SCHEME, dense=SCHEME)


@pytest.fixture(scope="module")
def source(demo):
    return open_source(ModelFolder.find(demo), torch.float32)


@pytest.fixture(scope="module")
def measurements(source):
    """Errors fall fourfold with each bit, and experts differ in how much they matter."""
    rng = np.random.default_rng(0)
    parts, kl = [], {}
    for stack in stacks(source, BASE):
        name = stack.module if stack.name.endswith(".weight") else stack.name
        E = stack.shape[0]
        matters = rng.gamma(0.5, size=E)
        errors = (0.1 * matters[:, None] * 4.0 ** -np.arange(4)).tolist()
        tokens = rng.integers(0, 5000, E).tolist()
        parts.append(Measured(name, stack.layer, name, tokens, errors, [1.0] * E))
        kl[name] = float(rng.gamma(1.0))
    return Measurements({}, parts, kl)


@pytest.mark.parametrize("bits", [2.3, 2.5, 3.0, 3.2, 4.0, 5.0, 6.5])
def test_a_budget_is_kept_and_filled(source, measurements, bits):
    budget = bytes_for(source, BASE, bits)
    chosen = choose(Disk(source), BASE, measurements, budget)
    assert chosen.nbytes == Disk(source).total(chosen.config)
    assert 0.99 * budget <= chosen.nbytes <= budget
    assert bits - 0.05 < average_bits(source, chosen.config) <= bits


def test_the_files_are_as_large_as_planned(source, measurements, demo, tmp_path):
    budget = bytes_for(source, BASE, 3.1)
    config = replace(choose(Disk(source), BASE, measurements, budget).config, method="rtn",
                     search_grid=False, refit=False)  # fmt: skip
    qmoe.quantize(demo, tmp_path / "out", config, progress=False)
    found = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert 0.985 * budget < found <= budget


def test_more_bytes_never_cost_more(source, measurements):
    budgets = [bytes_for(source, BASE, bits) for bits in (2.3, 2.6, 3, 4, 5, 7)]
    costs = [choose(Disk(source), BASE, measurements, budget).predicted for budget in budgets]
    assert costs == sorted(costs, reverse=True) and costs[0] > 10 * costs[-1]


def test_the_curve_falls_from_the_fewest_bits_to_the_most(source, measurements):
    found = curve(Disk(source), BASE, measurements)
    two = replace(SCHEME, bits=2)
    assert found[0]["bits"] == average_bits(source, replace(BASE, experts=two, dense=two))
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
    least = Disk(source).total(
        replace(BASE, experts=replace(SCHEME, bits=2), dense=replace(SCHEME, bits=2))
    )
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
        if bits == 2:  # there is no other choice
            digits = {digit for each in chosen.config.widths.values() for digit in each}
            assert digits == {"2"}
