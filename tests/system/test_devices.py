"""Layers run and solved on a device of their own, which is pretended: see pretend_device.py."""

from collections import OrderedDict, namedtuple
from dataclasses import replace

import pretend_device
import pytest
import torch
from helpers import ONE_DOMAIN, interrupt_after, mostly_slow, same_files, save_random
from remote_models import save
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.errors import ConfigError
from qmoe.packed.report import read_report
from qmoe.system.devices import CPU, find_device, moved

DEVICE = pretend_device.device()  # before any test's backward pass: autograd counts devices once
LOW = Scheme(2, 32, False)
TEXT = CalibrationConfig(ONE_DOMAIN, samples=6, seqlen=32, batch=2, self_samples=0)
FAST = QuantConfig(experts=LOW, search_grid=False, calibration=TEXT)
CONFIGS = {
    "rtn": QuantConfig("rtn", LOW),
    "column order": QuantConfig(
        experts=LOW, lm_head=LOW, search_grid=False, act_order=False, calibration=TEXT
    ),
    "search_grid": QuantConfig(experts=LOW, dense=LOW, calibration=TEXT),
    "tuned": QuantConfig(experts=LOW, dense=LOW, search_grid=False, tune=3, calibration=TEXT),
    "awq": QuantConfig("awq", LOW, calibration=TEXT),
    "awq-gptq": QuantConfig("awq-gptq", LOW, search_grid=False, calibration=TEXT),
}


@pytest.fixture
def there(monkeypatch):
    """The pretended device by the name of a GPU; attention computed alike on both."""
    monkeypatch.setattr(
        "qmoe.pipeline.plan.find_device", lambda name: DEVICE if name == "cuda" else CPU
    )
    monkeypatch.setattr("qmoe.pipeline.plan.check_fits", lambda *arguments: None)
    with sdpa_kernel(SDPBackend.MATH):
        yield DEVICE


def assert_tuned_alike(a, b):
    """The first layer up to a few integers that a last digit turns. One that sends a token to
    another expert changes all that follows, so of later layers the errors are compared."""
    files = list(a.glob("*.safetensors"))
    assert len(files) >= 2
    for file in files:
        here, there = load_file(file), load_file(b / file.name)
        assert here.keys() == there.keys()
        for name in (name for name in here if "layers.0." in name):
            differs = ~torch.isclose(here[name], there[name], rtol=1e-4, atol=1e-5)
            assert differs.double().mean() < 0.02, name
    for here, there in zip(read_report(a)["layers"], read_report(b)["layers"], strict=True):
        assert there["tuning"] == pytest.approx(here["tuning"], rel=3e-3)


def check(source, config, tmp_path, **options):
    """Both devices give the same bytes, and the pretended one did the work."""
    qmoe.quantize(source, tmp_path / "here", config, progress=False, **options)
    pretend_device.operations.clear()
    qmoe.quantize(source, tmp_path / "there", config, device="cuda", progress=False, **options)
    if config.tune:  # in other steps of summing, and so in other last digits
        assert_tuned_alike(tmp_path / "here", tmp_path / "there")
    else:
        assert same_files(tmp_path / "here", tmp_path / "there")
    assert pretend_device.operations["aten::round_"]
    if config.method != "rtn":  # text ran there
        assert pretend_device.operations["aten::silu"]
    if config.method.endswith("gptq"):
        assert pretend_device.operations["aten::linalg_cholesky_ex"]
    if config.tune:
        assert pretend_device.operations["aten::_softmax_backward_data"]


@pytest.mark.parametrize("name", mostly_slow([(n,) for n in CONFIGS], lambda n: n == "tuned"))
def test_a_device_gives_what_the_cpu_gives(name, demo, tmp_path, there):
    source = save_random("qwen2_moe", tmp_path / "source", demo, torch.float32)
    check(source, CONFIGS[name], tmp_path)


def test_so_it_does_with_grouped_routing_and_bf16(demo, tmp_path, there):
    source = save_random("deepseek_v3", tmp_path / "source", demo, torch.bfloat16)
    check(source, FAST, tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_so_it_does_with_experts_that_are_modules(demo, tmp_path, there):
    save("deepseek", tmp_path / "source", demo)
    check(tmp_path / "source", FAST, tmp_path, trust_remote_code=True)


@pytest.mark.slow
def test_distilling_on_a_device_comes_to_what_the_cpu_comes_to(demo, tmp_path, there):
    source = save_random("qwen2_moe", tmp_path / "source", demo, torch.float32)
    config = replace(FAST, distill=3)
    here = qmoe.quantize(source, tmp_path / "here", config, progress=False)
    pretend_device.operations.clear()
    away = qmoe.quantize(source, tmp_path / "there", config, device="cuda", progress=False)
    curves = [list(report["distilled"]["held_out_kl"].values()) for report in (here, away)]
    assert curves[1] == pytest.approx(curves[0], rel=3e-3)
    assert pretend_device.operations["aten::_softmax_backward_data"]


@pytest.mark.slow
def test_a_run_on_a_device_goes_on(demo, tmp_path, there, monkeypatch):
    source = save_random("mixtral", tmp_path / "source", demo, torch.float32)
    qmoe.quantize(source, tmp_path / "whole", FAST, device="cuda", progress=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(source, tmp_path / "out", FAST, device="cuda", progress=False)
    qmoe.quantize(source, tmp_path / "out", FAST, device="cuda", progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "out")


def test_forgotten_tensors_are_noticed(there):
    with pytest.raises(RuntimeError, match="two devices"):
        torch.ones(3).to(there) + torch.ones(3)


@pytest.mark.parametrize("name", ["gpu", "meta", "cuda:-2"])
def test_what_is_no_device(name):
    with pytest.raises(ConfigError, match="expected cpu, cuda or cuda:N"):
        find_device(name)


def test_a_device_that_is_not_there(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="'cuda:2' asked for, 2 CUDA devices found"):
        qmoe.quantize(demo, tmp_path / "out", FAST, device="cuda:2", progress=False)
    assert not list(tmp_path.iterdir())


def test_every_rank_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("qmoe.system.distributed.count", lambda: 3)
    for rank, index in ((0, 0), (1, 1), (2, 0)):
        monkeypatch.setattr("qmoe.system.distributed.local", lambda rank=rank: rank)
        assert find_device("cuda") == torch.device("cuda", index)
    assert find_device("cuda:1") == torch.device("cuda", 1)


def test_containers_that_layers_share_stay_the_same_objects(there):
    x, state, pair = torch.ones(2), {"x": torch.ones(2)}, namedtuple("Pair", "a b")
    places, ordered = [torch.ones(2), None, 3], OrderedDict(a=torch.ones(1))
    arguments = moved((x, state, places, pair(x, "b"), ordered, x), there)
    assert arguments[1] is state and arguments[2] is places and arguments[4] is ordered
    assert arguments[3].b == "b" and places[1:] == [None, 3]
    tensors = [arguments[0], state["x"], places[0], arguments[3].a, ordered["a"]]
    assert all(tensor.device == there for tensor in tensors)
    assert all(tensor.device == CPU for tensor in moved(tuple(tensors), CPU))
