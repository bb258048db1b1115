"""Suspended passes are the plain forward, bit for bit, with one layer in memory."""

import pytest
import torch
from helpers import FAMILIES, save_random
from transformers import AutoModelForCausalLM

from qmoe.measure.evaluate import streamed
from qmoe.model.layerwise import suspended
from qmoe.model.source import open_source
from qmoe.system.progress import silent

BATCHES = [torch.randint(0, 4096, (2, 24)), torch.randint(0, 4096, (3, 11))]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_the_whole_model(family, tmp_path, demo):
    path = save_random(family, tmp_path / "m", demo, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    source = open_source(path, torch.float32)
    batches = [("d", ids) for ids in BATCHES]
    for got, (_, ids) in zip(
        streamed(source, batches, torch.float32, silent), batches, strict=True
    ):
        with torch.no_grad():
            assert torch.equal(got, whole(input_ids=ids, use_cache=False).logits)
    assert all(p.device.type == "meta" for m in source.stages() for p in m.parameters())


class Chain(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_all_batches_wait_at_a_layer_together():
    model, order = Chain(), []

    def visit(i, forward, calls):
        order.append((i, len(calls)))
        return [forward(*c.args) + 10**i for c in calls]

    out = list(suspended(model, list(model.layers), [{"x": 1}, {"x": 2}], visit))
    assert out == [112, 113] and order == [(0, 2), (1, 2), (2, 2)]


def test_a_visitor_can_end_the_passes():
    model = Chain()
    visit = lambda i, forward, calls: None if i == 1 else [c.args[0] for c in calls]  # noqa: E731
    assert list(suspended(model, list(model.layers), [{"x": 1}], visit)) == []
    assert model(5) == 5  # the layers have their own forward back


def test_an_error_inside_a_layer_comes_out_and_restores_the_layers():
    model = Chain()

    def visit(i, forward, calls):
        raise ValueError("in the visitor")

    with pytest.raises(ValueError, match="in the visitor"):
        list(suspended(model, list(model.layers), [{"x": 1}], visit))
    assert model(7) == 7


def test_batches_that_part_ways_are_an_error():
    class Forked(Chain):
        def forward(self, x):
            return self.layers[x](x)

    model = Forked()
    with pytest.raises(RuntimeError, match="batches reached different layers after layer 0"):
        list(suspended(model, list(model.layers), [{"x": 0}, {"x": 1}], lambda i, f, c: [0, 0]))
