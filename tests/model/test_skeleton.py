"""Which tensors of a checkpoint make up which parameters, and what is wrong with those it has."""

import pytest
import torch
from helpers import save_random
from safetensors.torch import load_file, save_file

from qmoe.checkpoint.model_config import read_config
from qmoe.checkpoint.reader import Checkpoint
from qmoe.model.skeleton import build
from qmoe.model.weight_map import WeightMap

W1 = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
GATE_UP = "model.layers.1.mlp.experts.gate_up_proj"


@pytest.fixture
def weight_map(tmp_path, demo):
    """Makes the map of a Mixtral after a change of its tensors."""
    save_random("mixtral", tmp_path / "m", demo, torch.float32)

    def make(change=lambda tensors: None):
        file = tmp_path / "m" / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        checkpoint = Checkpoint(tmp_path / "m")
        return WeightMap(build(read_config(checkpoint), torch.float32, checkpoint), checkpoint)

    return make


def test_a_stack_is_fed_by_the_matrices_of_all_experts(weight_map):
    found = weight_map()
    names = [W1.replace(".2.w1", f".{e}.{w}") for e in range(4) for w in ("w1", "w3")]
    assert sorted(found.targets[GATE_UP]) == sorted(names)
    assert found.targets["model.layers.0.mlp.gate.weight"] == [
        "model.layers.0.block_sparse_moe.gate.weight"
    ]
    assert set(found.sources("model.layers.1.mlp.experts")) > set(names)
    assert found.sources("model.layers.1.mlp.expert") == []  # no prefix of a name counts
    assert sorted(found.names()) == sorted(found.checkpoint.names())
    complaints = (found.missing(), found.doubled(), found.misshapen(), found.unexpected)
    assert complaints == ([], [], [], [])


def test_what_is_missing_is_named_also_in_part(weight_map):
    def change(tensors):
        del tensors[W1], tensors["model.norm.weight"]

    assert weight_map(change).missing() == [
        "model.norm.weight", f"{GATE_UP}: has 7 of 8 tensors",
    ]  # fmt: skip


def test_what_belongs_to_nothing_and_what_has_another_shape_is_named(weight_map):
    def change(tensors):
        tensors["model.extra"] = torch.ones(2)
        tensors[W1] = torch.ones(95, 64)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].int()

    found = weight_map(change)
    assert found.unexpected == ["model.extra"]
    assert sorted(found.misshapen()) == [
        "lm_head.weight: is stored as torch.int32, the model needs torch.float32",
        f"{W1}: has shape (95, 64), the model needs (96, 64)",
    ]


def test_what_is_stored_twice_is_named(weight_map):
    def change(tensors):
        tensors["model.layers.1.mlp.gate.weight"] = torch.zeros(4, 64)

    (said,) = weight_map(change).doubled()
    assert said.startswith("model.layers.1.mlp.gate.weight is stored more than once: ")


def test_loading_stacks_the_experts_in_order(weight_map):
    found = weight_map()
    found.load(found.sources("model.layers.1"), torch.float32)
    stack = found.model.get_parameter(GATE_UP)
    stored = load_file(found.checkpoint.path / "model.safetensors")
    for e in range(4):
        w1, w3 = (stored[W1.replace(".2.w1", f".{e}.{w}")] for w in ("w1", "w3"))
        assert torch.equal(stack[e], torch.cat([w1, w3]))
    assert found.model.get_parameter("lm_head.weight").is_meta
