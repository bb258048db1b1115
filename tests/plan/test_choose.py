"""Which scheme is chosen, and what is said if none fits."""

import pytest
import torch
from helpers import save_random

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, QuantConfig, Scheme
from qmoe.errors import ConfigError, UnsupportedModelError
from qmoe.measure.families import families, save_tiny
from qmoe.model.source import open_source
from qmoe.plan.choose import measure, plan, schemes
from qmoe.plan.placement import Budget

LARGE = Budget(None, 10**12)


@pytest.fixture(scope="module")
def source(demo):
    return open_source(ModelFolder.find(demo), torch.float32)


def pairs(configs):
    return [(c.experts.bits, c.experts.group_size) for c in configs]


def test_the_widest_that_fits(source):
    configs, run = schemes(source, QuantConfig()), measure(source, 512)
    found = plan(source, configs, LARGE, run)
    assert found.chosen is found.candidates[0]
    needs = [candidate.placement.total()[1] for candidate in found.candidates]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs) == 10
    for i, need in enumerate(needs):
        assert plan(source, configs, Budget(None, need), run).chosen.config == configs[i]
        if i + 1 < len(needs):
            below = plan(source, configs, Budget(None, need - 1), run)
            assert below.chosen.config == configs[i + 1]


def test_nothing_fits(source):
    configs, run = schemes(source, QuantConfig()), measure(source, 512)
    need = plan(source, configs, LARGE, run).candidates[-1].placement.total()[1]
    with pytest.raises(ConfigError) as error:
        plan(source, configs, Budget(None, need - 7), run)
    said = str(error.value)
    assert f"with experts in int2 g128 sym, the smallest, the model needs {need} bytes of" in said
    assert "7 more than the" in said and "most of it is for Python and its libraries" in said
    with pytest.raises(ConfigError, match="bytes of GPU memory.* and .* bytes of host memory"):
        plan(source, configs, Budget(10, 10), run)


def test_what_is_given_is_not_chosen(source):
    assert pairs(schemes(source, QuantConfig(), 3)) == [(3, 32), (3, 64), (3, 128)]
    assert pairs(schemes(source, QuantConfig(), None, 64)) == [(8, 64), (4, 64), (3, 64), (2, 64)]
    assert pairs(schemes(source, QuantConfig(), 8, CHANNEL)) == [(8, CHANNEL)]
    with pytest.raises(ConfigError, match="no scheme fits; with experts in int8 g128"):
        plan(source, schemes(source, QuantConfig(), 8, 128), Budget(None, 1), measure(source, 64))


def test_zero_points_are_kept(source):
    config = QuantConfig(experts=Scheme(4, 128, symmetric=False))
    assert not any(c.experts.symmetric for c in schemes(source, config))


def test_groups_that_do_not_divide_are_left_out(demo, tmp_path):
    folder = save_random("mixtral", tmp_path / "m", demo, torch.bfloat16)  # 64 and 96 wide
    source = open_source(ModelFolder.find(folder), torch.float32)
    assert pairs(schemes(source, QuantConfig())) == [(4, 32), (3, 32), (2, 32)]
    with pytest.raises(ConfigError, match="group size 128 does not divide"):
        schemes(source, QuantConfig(), None, 128)


def test_a_context_that_the_model_does_not_have(source):
    with pytest.raises(ConfigError, match="context: 1025 tokens are more than the 1024 positions"):
        measure(source, 1025)
    with pytest.raises(ConfigError, match="context: expected 1 or more, got 0"):
        measure(source, 0)
    with pytest.raises(ConfigError, match="batch: expected 1 or more, got -1"):
        measure(source, 10, -1)


def test_a_family_whose_cache_cannot_be_found(tmp_path):
    family = next(f for f in families() if f.model_type == "jetmoe")
    save_tiny(family, tmp_path / "m")
    source = open_source(ModelFolder.find(tmp_path / "m"), torch.float32)
    with pytest.raises(UnsupportedModelError, match="without running the model"):
        measure(source, 20)


def test_no_weight_is_read(demo, monkeypatch):
    source = open_source(ModelFolder.find(demo), torch.float32)
    monkeypatch.setattr(type(source.checkpoint), "_stored", None)
    monkeypatch.setattr(type(source.weights), "load", None)
    plan(source, schemes(source, QuantConfig()), LARGE, measure(source, 64))


def test_a_longer_context_takes_more(source):
    configs = schemes(source, QuantConfig())
    short, long = (
        plan(source, configs, LARGE, measure(source, n)).chosen.placement for n in (128, 1024)
    )
    cache = 2 * 2 * 4 * 2 * 64 * (1024 - 128)  # keys and values, bfloat16, layers, heads, features
    assert long.total()[1] - short.total()[1] > cache
    assert long.read[1] - short.read[1] == cache
