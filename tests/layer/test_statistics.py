"""How far a layer is run where only some of it is asked for."""

from typing import Any

import pytest
import torch
from helpers import FAMILIES
from torch import nn
from transformers import AutoModelForCausalLM

from qmoe import QuantConfig
from qmoe.calibration.collect import collecting_linears
from qmoe.calibration.stats import LayerStats
from qmoe.layer.at_hand import LayerAtHand, LayerSettings
from qmoe.layer.statistics import EVERY, run_some
from qmoe.model.layerwise import Call
from qmoe.model.structure import Layer


class Block(nn.Module):
    """A linear, experts, and a linear behind them."""

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.before, self.experts, self.behind = nn.Linear(64, 64), experts, nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = torch.arange(len(x))[:, None] % 4
        return self.behind(self.experts(self.before(x), ids, torch.ones(len(x), 1)))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("gathered", [["block.before"], ["block.before", "block.behind"]])
def test_batches_end_at_the_experts_if_nothing_behind_them_is_gathered(gathered, keep):
    config = FAMILIES["mixtral"]()
    experts = AutoModelForCausalLM.from_config(config).model.layers[0].mlp.experts
    for parameter in experts.parameters():
        parameter.data.normal_(std=0.1)
    model: Any = nn.ModuleDict({"block": Block(experts)}).requires_grad_(False)
    layer = Layer("block", ["block.experts"], {}, gathered, [], {})
    at_hand = LayerAtHand.of(model, layer, model["block"].forward)
    settings = LayerSettings(QuantConfig(), 0, torch.float32)
    batches = [torch.randn(5, 64) for _ in range(EVERY + 2)]
    ran: list[int] = []
    model["block"].behind.register_forward_hook(lambda *_: ran.append(1))
    stats = LayerStats()
    with collecting_linears({n: model.get_submodule(n) for n in gathered}, stats):
        calls = [Call((x,), {}) for x in batches]
        outputs = run_some(at_hand, settings, calls, stats, keep)
    assert [y is not None for y in outputs] == [keep and i % EVERY == 0 for i in range(len(calls))]
    whole = len(batches) if len(gathered) == 2 else 1 + keep
    assert len(ran) == whole
    for i in (i for i, y in enumerate(outputs) if y is not None):
        assert torch.equal(outputs[i], model["block"](batches[i]))
    assert all(int(stats.linears[n].tokens) == 5 * len(batches) for n in gathered)
    assert torch.equal(model["block"](batches[1]), model["block"](batches[1]))  # runs through again
