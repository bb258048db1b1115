"""Counting where tokens go while models are scored."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qmoe.measure.routes import experts_used, kept, recorded

IDS = torch.zeros(1, 2, dtype=torch.long)
NAME = "layers.0.experts"


class Experts(nn.Module):
    """What qmoe takes for an experts module: the attributes of transformers' interface."""

    is_concatenated, num_experts = True, 3

    def _apply_gate(self):
        raise AssertionError

    def forward(self, x, ids, routing_weights):
        return x


@pytest.fixture
def model():
    root = nn.Module()
    root.layers = nn.ModuleList([nn.Module()])
    root.layers[0].experts = Experts()
    return root


def run(model, *ids):
    with recorded(model) as routes:
        for each in ids:
            model.get_submodule(NAME)(torch.ones(len(each), 2), torch.tensor(each), None)
    return routes


def test_tokens_are_counted_by_domain_and_sentinel_ids_are_no_expert(model):
    routes = run(model, [[0, 2], [2, 3]], [[1, 1]], [[0, 0]])
    batches = [("en", IDS), ("de", IDS), ("en", IDS)]
    assert experts_used(routes, batches, model) == {
        "en": {NAME: [3, 0, 2]},
        "de": {NAME: [0, 2, 0]},
    }


def test_an_expert_that_nothing_chooses_and_a_module_that_nothing_reaches(model):
    assert experts_used(run(model, [[0]]), [("en", IDS)], model) == {"en": {NAME: [1, 0, 0]}}
    assert experts_used({NAME: []}, [("en", IDS)], model) == {}


def test_choices_that_are_kept_in_any_order(model):
    before, after = run(model, [[0, 1], [1, 2]]), run(model, [[1, 0], [1, 0]])
    assert kept(before, after, model) == {NAME: pytest.approx(3 / 4)}
    assert kept({}, after, model) == {} and kept(before, {}, model) == {}


def test_nothing_is_watched_afterwards(model):
    routes = run(model, [[0]])
    model.get_submodule(NAME)(torch.ones(1, 2), torch.tensor([[1]]), SimpleNamespace())
    assert len(routes[NAME]) == 1
