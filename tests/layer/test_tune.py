"""Tuning layers against the original, and text that a model writes itself."""

from dataclasses import replace

import pytest
import torch
from helpers import ONE_DOMAIN, first_layers, interrupt_after, mostly_slow, same_files, save_random

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import CalibrationError, ConfigError
from qmoe.format.grid import limits
from qmoe.layer.latent import FakeQuantize
from qmoe.layer.routing import logits_error, relative_error, routes_kept
from qmoe.measure.evaluate import evaluate
from qmoe.model.source import open_source
from qmoe.packed.report import read_report
from qmoe.pipeline.self_text import _bytes

LOW = Scheme(2, 32, False)
TEXT = CalibrationConfig(ONE_DOMAIN, samples=16, seqlen=64, self_samples=0)
TUNED = QuantConfig(experts=LOW, dense=LOW, search_grid=False, tune=12, calibration=TEXT)


def test_rounding_on_the_grid_and_its_straight_through_gradient():
    latent = torch.tensor([[-3.0, -1.6, 0.4, 0.6, 1.2, 5.0]], requires_grad=True)
    scale = torch.tensor([[0.5, 2.0]], requires_grad=True)
    zero = torch.tensor([[0.0, 1.0]])
    weight = FakeQuantize.apply(latent, scale, zero, 2)  # integers -2..1, groups of three
    assert limits(2) == (-2, 1)
    assert torch.equal(weight, torch.tensor([[-1.0, -1.0, 0.0, 0.0, 0.0, 0.0]]))
    weight.backward(torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]]))
    # Beyond the ends of the grid a latent value changes nothing.
    assert torch.equal(latent.grad, torch.tensor([[0.0, 0.5, 0.5, 4.0, 4.0, 0.0]]))
    assert torch.equal(scale.grad, torch.tensor([[-4.0, 0.0]]))


def test_the_loss_weighs_tokens_by_their_size():
    target = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    output = target + torch.tensor([[0.5, 0.0], [0.0, 50.0], [1.0, 1.0]])
    assert torch.isclose(relative_error(output, target), torch.tensor((0.01 + 0.01) / 3))


def test_routes_kept_ignores_order_and_sentinels():
    before = [torch.tensor([[0, 1], [2, 4]]), torch.tensor([[3, 0]])]
    after = [torch.tensor([[1, 0], [4, 3]]), torch.tensor([[1, 0]])]
    assert routes_kept(before, after, experts=4) == pytest.approx(3 / 5)


def test_router_logits_count_less_their_mean():
    aim = {"experts": torch.tensor([[1.0, -1.0], [2.0, 0.0]])}
    same = {"experts": aim["experts"] + 7}
    assert logits_error(same, aim) == 0
    other = {"experts": torch.tensor([[2.0, -2.0], [2.0, 0.0]])}
    assert torch.isclose(logits_error(other, aim), torch.tensor(0.5))
    assert logits_error({}, {}) == 0
    with pytest.raises(CalibrationError, match="experts: .*other tokens.*--tune 0"):
        logits_error({"experts": aim["experts"][:1]}, aim)


def test_tuning_brings_a_layer_closer(demo, tmp_path):
    source = first_layers(demo, tmp_path / "source", 1)
    text = CalibrationConfig(ONE_DOMAIN, samples=24, seqlen=64, batch=4, self_samples=0)
    config = replace(TUNED, refit=False, tune=24, calibration=text)
    (layer,) = qmoe.quantize(source, tmp_path / "out", config, progress=False)["layers"]
    assert layer["tuning"]["tuned"] < layer["tuning"]["solved"]


@pytest.mark.slow
def test_tuning_brings_layers_closer_and_says_what_became_of_routing(demo, tmp_path):
    text = CalibrationConfig(samples=24, seqlen=64, batch=4, self_samples=0)
    config = replace(TUNED, refit=False, tune=24, calibration=text)
    report = qmoe.quantize(demo, tmp_path / "out", config, progress=False)
    assert len(report["layers"]) == 4
    for layer in report["layers"]:
        assert layer["tuning"]["tuned"] < layer["tuning"]["solved"]
        assert layer["tuning"]["tuned"] == layer["error"]
        for entry in layer["experts"].values():
            assert 0.5 < entry["routing_kept"]["solved"] <= 1
            assert 0.5 < entry["routing_kept"]["tuned"] <= 1
    # On held-out text, and every norm and router that moved is stored as it was tuned.
    assert evaluate(tmp_path / "out", against=demo, samples=2)["overall"]["qmoe"]["kl"] < 0.2


@pytest.mark.parametrize(
    "family",
    mostly_slow([("deepseek_v3",), ("qwen2_moe",), ("gpt_oss",)], lambda name: name == "gpt_oss"),
)
def test_tuned_families_pass_the_audit_and_load(family, demo, tmp_path):
    source = save_random(family, tmp_path / "source", demo, torch.bfloat16)
    qmoe.quantize(source, tmp_path / "out", replace(TUNED, tune=3), progress=False)
    model, tokenizer = qmoe.load(tmp_path / "out")
    ids = tokenizer("The", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()


def test_a_tuned_run_goes_on_to_the_same_bytes(demo, tmp_path, monkeypatch):
    source = save_random("qwen3_moe", tmp_path / "source", demo, torch.bfloat16)
    config = replace(TUNED, tune=3, calibration=replace(TEXT, samples=6, self_samples=4))
    qmoe.quantize(source, tmp_path / "whole", config, progress=False)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 1)
        with pytest.raises(KeyboardInterrupt):
            qmoe.quantize(source, tmp_path / "out", config, progress=False)
    with monkeypatch.context() as patch:  # what the model wrote is kept, not written again
        patch.setattr("qmoe.pipeline.self_text.write", None)
        qmoe.quantize(source, tmp_path / "out", config, progress=False)
    assert same_files(tmp_path / "whole", tmp_path / "out")
    report = read_report(tmp_path / "out")
    assert (
        report["calibration"]["samples"] == [10, 64] and report["calibration"]["self_samples"] == 4
    )
    assert not [line for line in report["fallbacks"] if "text" in line]


def test_no_memory_to_write_text_is_reported(short, tmp_path, monkeypatch):
    monkeypatch.setattr("qmoe.pipeline.self_text.free", lambda: 100_000)
    config = QuantConfig(search_grid=False, calibration=replace(TEXT, self_samples=4))
    report = qmoe.quantize(short, tmp_path / "out", config, progress=False)
    assert report["fallbacks"][0].startswith(
        "no text was written, 4 samples asked for: that takes 6.23 MB"
    )
    assert report["calibration"]["samples"] == [16, 64]
    assert report["calibration"]["self_samples"] == 0


def test_without_memory_for_the_original_a_copy_writes(short, tmp_path, monkeypatch):
    whole, copy = _bytes(open_source(ModelFolder(short), torch.bfloat16))
    monkeypatch.setattr("qmoe.pipeline.self_text.free", lambda: int(1.3 * (whole + copy) / 2))
    config = QuantConfig(search_grid=False, calibration=replace(TEXT, self_samples=4))
    report = qmoe.quantize(short, tmp_path / "out", config, progress=False)
    first = report["fallbacks"][0]
    assert first.startswith("a copy with 4-bit experts wrote text, 4 samples asked for: the orig")
    assert report["calibration"]["samples"] == [20, 64]
    assert report["calibration"]["self_samples"] == 4
    assert not list((tmp_path / "out").glob(".qmoe*"))  # the copy is gone


@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_tuning_starts_from_gptq(method):
    with pytest.raises(ConfigError, match="tune: .* gptq"):
        QuantConfig(method, tune=10)


def test_a_family_that_cannot_continue_text_is_reported(short, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("this cache has no length")

    monkeypatch.setattr("qmoe.pipeline.self_text._continue", fail)
    config = QuantConfig(search_grid=False, calibration=replace(TEXT, self_samples=4))
    report = qmoe.quantize(short, tmp_path / "out", config, progress=False)
    assert "generating failed: ValueError: this cache has no length" in report["fallbacks"][0]
    assert report["calibration"]["self_samples"] == 0
