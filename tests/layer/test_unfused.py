"""Experts that are modules of their own: what rare ones borrow, against sums made by hand."""

import torch
from helpers import assert_close
from torch import nn

from qmoe import Scheme
from qmoe.calibration.collect import collecting_linears, sampling_tokens
from qmoe.calibration.stats import LayerStats
from qmoe.layer.at_hand import LayerAtHand
from qmoe.layer.records import ExpertsRecord
from qmoe.layer.unfused import borrow, modules_of
from qmoe.model.structure import Layer


def test_the_weight_and_inputs_of_what_is_borrowed():
    """For an expert with tokens of its own and one without."""
    torch.manual_seed(0)
    experts = nn.ModuleList(
        nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 32)) for _ in range(2)
    ).requires_grad_(False)
    model = nn.ModuleDict({"experts": experts})
    linears = [[f"experts.{e}.{n}" for n in "02"] for e in range(2)]
    layer = Layer("", [], {"experts": linears}, [], [], {})
    names = layer.unfused_linears()
    at_hand = LayerAtHand.of(model, layer, model.forward, dict.fromkeys(names, Scheme()))
    stats, own = LayerStats(), torch.randn(4, 32)
    modules = {n: model.get_submodule(n) for n in names}
    lists = modules_of(at_hand, names)
    with sampling_tokens(lists, 3, stats.samples), collecting_linears(modules, stats):
        experts[0](own[:2])
        experts[0](own[2:])
    sample = stats.samples["experts"]
    assert torch.equal(sample, own[[0, 3]])
    records = borrow(at_hand, names, stats, 10)
    for e, weight in ((0, 6 / 2), (1, 10 / 2)):
        for linear, inside in (("0", lambda e, x: x), ("2", lambda e, x: experts[e][:2](x))):
            expected = weight * inside(e, sample).T @ inside(e, sample)
            if e == 0:
                expected += inside(0, own).T @ inside(0, own)
            assert_close(stats.linears[f"experts.{e}.{linear}"].hessian, expected)
    assert records == {"experts": ExpertsRecord([4, 0], borrowed=[0, 1])}
