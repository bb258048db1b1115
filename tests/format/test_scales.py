"""Scales that their dtype can hardly hold, or not at all: integers fit what is stored, subnormal
numbers are used, rows at the bounds are reported, and loading in a narrower dtype refuses."""

from itertools import product

import pytest
import torch
from helpers import ONE_DOMAIN, mostly_slow, save_random, second_matrix, slow
from safetensors.torch import load_file, save_file

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import BITS, CHANNEL
from qmoe.errors import ConfigError
from qmoe.format.grid import covering_scale, dequantize, rows_at_bounds, stored_scale
from qmoe.layer.records import LayerRecord, MatrixRecord
from qmoe.packed.audit import audit_folder
from qmoe.packed.report import fallbacks
from qmoe.solvers.awq import Reader, awq_scales, output_error
from qmoe.solvers.solve import join, solve

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
SOLVERS = [("rtn", False), ("gptq", False), ("gptq", True), ("awq", False)]
TEXT = CalibrationConfig(ONE_DOMAIN, samples=4, seqlen=32, self_samples=0)


def solved(weight, scheme, dtype, method="rtn", search_grid=False, hessian=None):
    if hessian is None:
        x = torch.randn(len(weight), 256, weight.shape[-1], generator=torch.Generator())
        hessian = x.mT @ x
    return solve(
        weight, hessian, scheme, method,
        scale_dtype=dtype, act_order=True, damp=0.01, search_grid=search_grid,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [HALF, BRAIN, FULL])
def test_every_stored_scale_is_a_positive_number_near_what_was_wanted(dtype):
    info = torch.finfo(dtype)
    least = info.tiny * info.eps
    wanted = torch.tensor(
        [0.0, least / 8, least, 2.4 * least, 100.3 * least, info.tiny, 1.0, info.max]
    )
    stored, above = stored_scale(wanted, dtype), covering_scale(wanted, dtype)
    for scale in (stored, above):
        assert torch.equal(scale.to(dtype).float(), scale)
        assert (scale > 0).all() and scale.isfinite().all()
    assert (above >= wanted).all()
    assert stored[0] == above[0] == info.tiny  # nothing to scale
    assert stored[2] == least
    if dtype != FULL:  # in which these cannot be asked for
        assert stored[1] == least and stored[3] == 2 * least and above[3] == 3 * least
    assert ((stored - wanted).abs()[4:] <= wanted[4:] / 100).all()


SIZES = [(HALF, 1e-5), (HALF, 1e-4), (HALF, 1e4)]
SIZES += [(dtype, size) for dtype in (BRAIN, FULL) for size in (1e-25, 1e25)]
CASES = [(*c[0], c[1], c[2], *c[3]) for c in product(SOLVERS, BITS, (True, False), SIZES)]


def one_in_four(method, search_grid, bits, symmetric, dtype, size):
    """Every pair of two settings is among them."""
    at = SOLVERS.index((method, search_grid)) + BITS.index(bits) + SIZES.index((dtype, size))
    return (at + 2 * symmetric) % 4 == 0


@pytest.mark.parametrize(
    "method, search_grid, bits, symmetric, dtype, size", mostly_slow(CASES, one_in_four)
)
def test_tiny_and_huge_rows_lose_what_others_lose(
    method, search_grid, bits, symmetric, dtype, size
):
    """Relative to a matrix of ordinary size; it was all of them in float16, and an error of exactly
    nothing where squares were below what float32 holds."""
    scheme = Scheme(bits, 32, symmetric)
    plain = torch.randn(2, 16, 64)
    x = torch.randn(2, 256, 64)
    x *= torch.rand(64).exp2()
    hessian = x.mT @ x
    usual = solved(plain, scheme, dtype, method, search_grid, hessian)
    weight = (plain * size).to(dtype)
    found = solved(weight, scheme, dtype, method, search_grid, hessian)
    true = (dequantize(found.quantized) - weight.float()).double() / size
    lost = ((true @ hessian.double()) * true).sum((1, 2))
    ratio = (lost / ((plain.double() @ hessian.double()) * plain).sum((1, 2))).sqrt()
    for e in range(2):
        # A search is judged by squares, which it may not have here; it is then GPTQ without one.
        assert ratio[e] <= usual.error[e] * (1.5 if search_grid else 1.3)
        assert found.error[e] == pytest.approx(float(ratio[e]), rel=0.02)
    assert found.bounded == {} or (dtype == HALF and size == 1e-5 and bits == 8)


def test_integers_fit_the_scale_that_is_stored():
    """1.4 of the smallest number: the largest weight is not cut off."""
    least = 2.0**-24
    weight = torch.linspace(-1, 1, 32).view(1, 1, 32) * 1.4 * least * 7.5
    made = solved(weight, Scheme(4, 32), HALF).quantized
    assert float(made.scale) == 2 * least
    assert (dequantize(made) - weight).abs().max() <= least * 1.0001


def test_rows_beyond_the_bounds_are_counted_and_reported():
    weight = torch.ones(3, 4, 32)
    weight[1, 2] = 1e-9
    weight[2, :2, 0] = 1e7
    weight[2, 2:] = 0
    scheme = Scheme(4, CHANNEL)
    assert rows_at_bounds(weight, scheme, HALF).tolist() == [0, 1, 2]
    assert rows_at_bounds(weight, scheme, BRAIN).tolist() == [0, 0, 0]
    found = join([solved(weight[:1], scheme, HALF), solved(weight[1:], scheme, HALF)])
    assert found.bounded == {1: 1, 2: 2}
    up = MatrixRecord(bounded={1: 1, 2: 2}, scale_dtype="float16")
    [line] = fallbacks(LayerRecord("layer", dense={"up": up}))
    assert line == (
        "up: rows too small or too large for scales in float16, coarser than their bits: "
        "1 (matrix 1), 2 (matrix 2)"
    )


def test_output_errors_of_any_size():
    D, x = torch.randn(1, 8, 16), torch.randn(1, 64, 16)
    H = x.mT @ x
    usual = output_error(D, H)
    for exponent in (-100, -60, 60, 100):
        found = output_error(D * 2.0**exponent, H)
        assert torch.equal(found, usual * 2.0 ** (2 * exponent))
    assert output_error(torch.zeros_like(D), H) == 0


def test_awq_scales_do_not_depend_on_the_size_of_the_weights():
    W, x = torch.randn(1, 16, 64), torch.randn(1, 256, 64)
    x[:, :, :4] *= 30
    scales = [
        awq_scales([Reader(W * size, x.mT @ x, Scheme(4, 32))], scale_dtype=BRAIN, shared=False)
        for size in (1.0, 2.0**-80, 2.0**70)
    ]
    assert not torch.equal(scales[0], torch.ones_like(scales[0]))
    assert torch.equal(scales[0], scales[1]) and torch.equal(scales[0], scales[2])


def faint(path, demo, size, dtype=HALF):
    """A model whose experts' down matrices are tiny in a few rows, or in all of one expert."""
    source = save_random("mixtral", path, demo, dtype)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith("experts.1.w2.weight"):
            tensors[name] *= size
        if name.endswith("experts.2.w3.weight"):
            tensors[name][5] *= size
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return source


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig("rtn", Scheme(8, 32)),
        slow(QuantConfig("awq", Scheme(8, 32), calibration=TEXT)),
        slow(QuantConfig("gptq", Scheme(8, 32), search_grid=True, refit=True, calibration=TEXT)),
        QuantConfig("gptq", Scheme(4, 32, False), search_grid=False, tune=3, calibration=TEXT),
    ],
    ids=["rtn", "awq", "gptq", "tuned"],
)
def test_a_float16_model_with_tiny_rows(config, demo, tmp_path):
    source, quantized = faint(tmp_path / "source", demo, 1e-3), tmp_path / "quantized"
    report = qmoe.quantize(source, quantized, config, progress=False)
    assert not [line for line in report["fallbacks"] if "scales" in line]
    audit_folder(ModelFolder(quantized))
    tensors = {}
    for file in quantized.glob("*.safetensors"):
        tensors |= load_file(file)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight_scale"
    assert tensors[name].dtype == HALF and (tensors[name].float() < torch.finfo(HALF).tiny).any()
    model, _ = qmoe.load(quantized, progress=False)  # runs in float16
    if config.applies_awq:  # which moves size from one matrix to another
        [entry] = report["layers"][0]["experts"].values()
        assert entry["down_proj"]["error"][1] < 0.03
        return
    experts = model.get_submodule("model.layers.0.mlp.experts")
    wanted = load_file(source / "model.safetensors")[name.removesuffix("_scale")].float()
    lost = float((second_matrix(experts, 1).float() - wanted).norm() / wanted.norm())
    assert lost < (0.03 if config.experts.bits == 8 else 0.2)  # it was 0.4 and more


def test_rows_at_the_bounds_are_in_the_report_and_survive_a_resumed_run(demo, tmp_path):
    source = faint(tmp_path / "source", demo, 1e-5)
    config = QuantConfig("gptq", Scheme(8, 32), search_grid=False, calibration=TEXT)
    report = qmoe.quantize(source, tmp_path / "q", config, progress=False)
    said = [line for line in report["fallbacks"] if "float16, coarser" in line]
    assert len(said) == 4  # up of expert 2 and down of expert 1, in two layers
    assert "model.layers.0.mlp.experts.gate_up_proj: rows too small" in said[0]
    assert "1 (matrix 2)" in said[0] and "64 (matrix 1)" in said[1]


def test_a_head_at_the_bounds_is_in_the_report(demo, tmp_path):
    source = save_random("mixtral", tmp_path / "source", demo, HALF)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"][3] *= 1e-6
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = QuantConfig(
        "gptq", Scheme(8, 32), lm_head=Scheme(8, 32), search_grid=False, calibration=TEXT
    )
    report = qmoe.quantize(source, tmp_path / "q", config, progress=False)
    assert [line for line in report["fallbacks"] if line.startswith("lm_head: rows too small")]


def test_scales_that_the_dtype_asked_for_cannot_hold(demo, tmp_path):
    """bfloat16 reaches further down than float16."""
    source, quantized = faint(tmp_path / "source", demo, 1e-8, BRAIN), tmp_path / "quantized"
    qmoe.quantize(source, quantized, QuantConfig("rtn", Scheme(8, 32)), progress=False)
    with pytest.raises(
        ConfigError, match=r"scales that torch.float16 cannot hold.*bfloat16 or float32"
    ):
        qmoe.load(quantized, HALF, progress=False)
    for dtype in (None, FULL):
        qmoe.load(quantized, dtype, progress=False)


def test_groups_of_zeros_load_in_any_dtype(demo, tmp_path):
    """Their scale is smaller than float16's smallest, and nothing is lost with it."""
    source, quantized = faint(tmp_path / "source", demo, 0.0, BRAIN), tmp_path / "quantized"
    report = qmoe.quantize(source, quantized, QuantConfig("rtn", Scheme(4, 32)), progress=False)
    assert report["fallbacks"] == []
    model, _ = qmoe.load(quantized, HALF, progress=False)
    assert (second_matrix(model.get_submodule("model.layers.0.mlp.experts"), 1) == 0).all()
