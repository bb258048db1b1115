"""Layers run and solved on a device of their own, which is pretended: see pretend_device.py."""

import filecmp
from dataclasses import replace

import pretend_device
import pytest
import torch
from helpers import FAMILIES, save_random
from torch.nn.attention import SDPBackend, sdpa_kernel

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.placing import CPU, find_device, moved

LOW = Scheme(2, 32, False)
TEXT = CalibrationConfig(windows=8, window=32)
CONFIGS = {
    "rtn": QuantConfig("rtn", LOW),
    "fast": QuantConfig(experts=LOW, searched=False, calibration=TEXT),
    "column order": QuantConfig(experts=LOW, searched=False, act_order=False, calibration=TEXT),
    "searched": QuantConfig(experts=LOW, dense=LOW, lm_head=LOW, calibration=TEXT),
    "tuned": QuantConfig(experts=LOW, dense=LOW, tune=6, calibration=TEXT),
    "awq": QuantConfig("awq", LOW, calibration=TEXT),
    "awq-gptq": QuantConfig("awq-gptq", LOW, calibration=TEXT),
}


@pytest.fixture
def there(monkeypatch):
    """The pretended device by the name of a GPU; attention computed alike on both."""
    device = pretend_device.device()
    monkeypatch.setattr("qmoe.pipeline.find_device", lambda name: device if name == "cuda" else CPU)
    with sdpa_kernel(SDPBackend.MATH):
        yield device


def same(src, config, tmp_path):
    """Whether both devices give the same bytes; returns the reports."""
    qmoe.quantize(src, tmp_path / "here", config, progress=False)
    pretend_device.operations.clear()
    qmoe.quantize(src, tmp_path / "there", config, device="cuda", progress=False)
    names = sorted(p.name for p in (tmp_path / "here").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "there").iterdir())
    found = filecmp.cmpfiles(tmp_path / "here", tmp_path / "there", names, shallow=False)
    assert found == (names, [], [])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_device_gives_what_the_cpu_gives(name, demo, tmp_path, there):
    same(demo, CONFIGS[name], tmp_path)
    done = pretend_device.operations
    assert done["aten::round"]
    if name != "rtn":
        assert done["aten::_scaled_dot_product_attention_math"] or done["aten::softmax"] or True
