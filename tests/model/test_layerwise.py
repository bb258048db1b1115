"""Suspended passes are the plain forward, bit for bit, with one layer in memory."""

import pytest
import torch
from helpers import FAMILIES, save_random
from transformers import AutoModelForCausalLM

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.measure.logits import streamed
from qmoe.model.layerwise import Finished, suspended
from qmoe.model.source import open_source

BATCHES = [torch.randint(0, 4096, (2, 24)), torch.randint(0, 4096, (3, 11))]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_those_of_the_whole_model(family, tmp_path, demo):
    path = save_random(family, tmp_path / "m", demo, torch.float32)
    whole = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    source = open_source(ModelFolder(path), torch.float32)
    batches = [("d", ids) for ids in BATCHES]
    for got, (_, ids) in zip(streamed(source, batches, torch.float32), batches, strict=True):
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
    model, order, out = Chain(), [], []
    for event in suspended(model, list(model.layers), [{"x": 1}, {"x": 2}]):
        if isinstance(event, Finished):
            out.append(event.output)
        else:
            order.append((event.index, len(event.calls)))
            event.go_on([event.forward(*c.args) + 10**event.index for c in event.calls])
    assert out == [112, 113] and order == [(0, 2), (1, 2), (2, 2)]


def test_the_passes_end_where_nobody_lets_them_go_on():
    model, order = Chain(), []
    for event in suspended(model, list(model.layers), [{"x": 1}]):
        order.append(event.index)
        if event.index == 0:
            event.go_on([c.args[0] for c in event.calls])
    assert order == [0, 1]
    assert model(5) == 5  # the layers have their own forward back


def test_an_error_inside_a_layer_comes_out_and_restores_the_layers():
    model = Chain()

    model.layers[1].forward = lambda x: 1 / 0
    passes = suspended(model, [model.layers[0]], [{"x": 1}])
    next(passes).go_on([1])
    with pytest.raises(ZeroDivisionError):
        next(passes)
    del model.layers[1].forward
    assert model(7) == 7


def test_batches_that_part_ways_are_an_error():
    class Forked(Chain):
        def forward(self, x):
            return self.layers[x](x)

    model = Forked()
    with pytest.raises(RuntimeError, match="batches reached different layers after layer 0"):
        next(suspended(model, list(model.layers), [{"x": 0}, {"x": 1}]))


def test_one_batch_that_ends_early_is_an_error():
    class Short(Chain):
        def forward(self, x):
            return super().forward(x) if x else self.layers[0](x)

    model = Short()
    passes = suspended(model, list(model.layers), [{"x": 0}, {"x": 1}])
    next(passes).go_on([0, 1])
    with pytest.raises(RuntimeError, match="batches reached different layers after layer 1"):
        list(passes)
