"""Matrices fitted to what quantized ones before them give, against sums and fits made by hand."""

import json

import pytest
import torch
from helpers import FAMILIES, ONE_DOMAIN, assert_close, first_layers
from torch import nn
from transformers import AutoModelForCausalLM

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.calibration.coverage import average_weight
from qmoe.calibration.moments import keeping_inputs, second_moments
from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.layer.refit import steps
from qmoe.model import experts
from qmoe.solvers.refit import refit
from qmoe.system.spill import Scratch

LOW = Scheme(2, 32, False)


def test_refit_is_the_damped_least_squares_fit():
    torch.manual_seed(0)
    x = torch.randn(50, 16)
    y = x + 0.3 * torch.randn(50, 16)
    W, H = torch.randn(1, 8, 16), (y.T @ y)[None]
    made = refit(W, (x.T @ y)[None], H, 0.1)
    # The damping as sixteen tokens more, from which W is to give what it gives.
    more = torch.eye(16) * (0.1 * H[0].diagonal().mean()).sqrt()
    inputs, outputs = torch.cat([y, more]), torch.cat([x, more]) @ W[0].T
    assert_close(made[0], torch.linalg.lstsq(inputs, outputs).solution.T)


def test_refit_leaves_weights_whose_inputs_did_not_change():
    torch.manual_seed(0)
    W = torch.randn(3, 8, 16)
    x = torch.randn(3, 5, 16)  # fewer tokens than features
    H = x.mT @ x
    H[2] = 0  # an expert that saw nothing
    assert_close(refit(W, H, H, 0.01), W)


@pytest.mark.parametrize("concatenated", [True, False], ids=["gate, up", "interleaved"])
def test_moments_of_second_inputs(concatenated):
    """An expert with tokens, one with a single one, and one without that borrows all it sees."""
    torch.manual_seed(0)
    config = FAMILIES["mixtral"]()
    module = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    module.requires_grad_(False).is_concatenated = concatenated
    if not concatenated:
        module._apply_gate = lambda y: module.act_fn(y[..., 0::2]) * y[..., 1::2]
    for p in module.parameters():
        p.normal_(std=0.2)
    x, ids, gates = torch.randn(9, 64), torch.zeros(9, 1, dtype=torch.int64), torch.rand(9, 1)
    ids[4] = 1
    routed = RoutedTokens(module, True, 2, Scratch())
    routed.saw(x, ids, gates)
    routed.finish()
    other = experts.stack(module, "gate_up_proj")[:3] + 0.05 * torch.randn(3, 192, 64)
    cross, hessian = second_moments(routed, 0, other, min_tokens=4)

    def middle(stack, rows):
        gate, up = (rows @ stack.T).chunk(2, dim=1)
        return module.act_fn(gate) * up

    whole, sample = experts.stack(module, "gate_up_proj"), x[::2]
    for e, lacking in ((0, 0), (1, 3), (2, 4)):
        own = ids[:, 0] == e
        rows = torch.cat([x[own], sample])
        share = torch.full((len(sample),), lacking * average_weight(routed) / len(sample))
        w = torch.cat([gates[own, 0].square(), share])[:, None]
        before, after = middle(whole[e], rows), middle(other[e], rows)
        assert_close(cross[e], (w * before).T @ after)
        assert_close(hessian[e], (w * after).T @ after)


class Block(nn.Module):
    """q and k read x, o what they give, and `again` runs twice."""

    def __init__(self):
        super().__init__()
        for name in ("q", "k", "o", "again", "last"):
            setattr(self, name, nn.Linear(4, 4, bias=False))

    def forward(self, x):
        y = self.o(self.q(x) + self.k(x))
        return self.last(self.again(self.again(y)))


def test_inputs_are_kept_behind_the_first_and_if_there_is_one_a_run():
    torch.manual_seed(0)
    block = Block().requires_grad_(False)
    linears = dict(block.named_children())
    with keeping_inputs(linears, Scratch()) as inputs:
        runs = [torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
        for x in runs:
            block(x)
    assert inputs.owners == {"q": "", "k": "", "o": "o", "again": "", "last": "last"}
    assert list(inputs.tensors) == ["o", "last"]
    for x, kept in zip(runs, inputs.tensors["o"], strict=True):
        assert torch.equal(kept, (block.q(x) + block.k(x)).bfloat16())


def test_linears_are_solved_one_behind_the_other():
    owners = {"k": "", "q": "", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
    names = ["up", "gate", "down", "never called", "o", "q", "k"]
    assert steps(names, owners) == [
        ("", ["never called", "q", "k"]),
        ("o", ["o"]),
        ("gate", ["up", "gate"]),
        ("down", ["down"]),
    ]
    assert steps(["o"], {"q": "", "o": "o"}) == [("", []), ("o", ["o"])]


def test_layers_come_closer_to_the_originals(demo, tmp_path):
    source = first_layers(demo, tmp_path / "source", 1)
    text = CalibrationConfig(ONE_DOMAIN, samples=16, seqlen=128, self_samples=0)
    error = {}
    for on in (False, True):
        config = QuantConfig(experts=LOW, dense=LOW, search_grid=False, refit=on, calibration=text)
        report = qmoe.quantize(source, tmp_path / f"{on}", config, progress=False)
        error[on] = report["layers"][0]["error"]
    assert error[True] < 0.95 * error[False]


def test_statistics_in_files_go_without_and_say_so(demo, tmp_path):
    source = first_layers(demo, tmp_path / "source", 1)
    config = QuantConfig(
        search_grid=False, calibration=CalibrationConfig(ONE_DOMAIN, samples=4, self_samples=0)
    )
    qmoe.quantize(
        source, tmp_path / "out", config, save_statistics=tmp_path / "stats", progress=False
    )
    report = json.loads((tmp_path / "out" / "qmoe_report.json").read_text())
    assert "matrices are not refitted" in report["fallbacks"][0]
