"""What is stored under which name, written out by hand for a family of each kind."""

import pytest
import torch
from helpers import FAMILIES

from qmoe.model.skeleton import build
from qmoe.model.tensor_names import matrix_names, original_names, packed_names, stored_fused


def model(family, **changes):
    config = FAMILIES[family]()
    return build(type(config).from_dict(config.to_dict() | changes), torch.float32)


MIXTRAL = "model.layers.{}.block_sparse_moe.experts.{}.{}.weight"
QWEN = "model.layers.{}.mlp.experts.{}.{}.weight"


@pytest.mark.parametrize("layer", [1, 10], ids=str)
def test_a_family_with_a_matrix_per_expert(layer):
    """`layers.1` is a prefix of `layers.10`."""
    mixtral = model("mixtral", num_hidden_layers=11)
    target = f"model.layers.{layer}.mlp.experts.gate_up_proj"
    assert matrix_names(mixtral, target, 4, 2) == [
        MIXTRAL.format(layer, e, name) for e in range(4) for name in ("w1", "w3")
    ]
    target = f"model.layers.{layer}.mlp.experts.down_proj"
    assert matrix_names(mixtral, target, 4, 1) == [MIXTRAL.format(layer, e, "w2") for e in range(4)]
    assert not stored_fused(mixtral)


def test_a_family_with_all_experts_in_one_tensor_gets_names_of_its_own():
    gpt_oss = model("gpt_oss")
    experts = "model.layers.0.mlp.experts"
    assert stored_fused(gpt_oss)
    assert matrix_names(gpt_oss, f"{experts}.gate_up_proj", 4, 2) == [
        f"{experts}.{e}.{name}.weight" for e in range(4) for name in ("gate_proj", "up_proj")
    ]


def test_rows_of_scales_go_where_the_rows_of_weights_go():
    qwen = model("qwen3_moe")
    E, N = 6, 32
    rows = torch.arange(E * 2 * N).view(E, 2 * N, 1)  # as scales: another last dimension
    named = packed_names(qwen, "model.layers.1.mlp.experts.gate_up_proj", rows)
    assert len(named) == 2 * E
    for e in range(E):
        gate, up = (named[QWEN.format(1, e, name)] for name in ("gate_proj", "up_proj"))
        assert gate.flatten().tolist() == list(range(2 * N * e, 2 * N * e + N))
        assert up.flatten().tolist() == list(range(2 * N * e + N, 2 * N * (e + 1)))


def test_a_linear_keeps_its_name():
    qwen = model("qwen3_moe")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert matrix_names(qwen, name, None, 1) == [name]
    tensor = torch.randn(64, 3)
    (found,) = packed_names(qwen, name, tensor).items()
    assert found[0] == name and torch.equal(found[1], tensor)


def test_a_router_is_named_as_its_family_publishes_it():
    router = torch.zeros(4, 64)
    named = original_names(model("mixtral"), "model.layers.0.mlp.gate.weight", router)
    assert list(named) == ["model.layers.0.block_sparse_moe.gate.weight"]
