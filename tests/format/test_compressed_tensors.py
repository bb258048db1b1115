"""What a matrix is stored as, what config.json says of it, and the way back."""

import pytest
import torch

from qmoe.config import Scheme
from qmoe.errors import CheckpointError
from qmoe.format.compressed_tensors import (
    Schemes,
    packed_tensors,
    quantization_config,
    unpacked_tensors,
)
from qmoe.format.grid import dequantize
from qmoe.solvers.rtn import rtn

EXPERTS, DENSE, HEAD = Scheme(3, 32, False), Scheme(8, -1), Scheme(4, 64)


def schemes(experts=EXPERTS, dense=DENSE, head=HEAD, **changes):
    entry = quantization_config(experts, dense, head, ["model.layers.0.mlp.gate"])
    entry["quant_method"] = "compressed-tensors"
    return Schemes({"quantization_config": entry | changes}, "folder")


def test_every_module_gets_the_scheme_of_its_kind():
    found = schemes()
    assert found.of("model.layers.0.mlp.experts.11.up_proj") == EXPERTS
    assert found.of("encoder.block.1.mlp.experts.expert_3.wi") == EXPERTS
    assert found.of("model.layers.0.mlp.shared_experts.up_proj") == DENSE
    assert found.of("model.layers.0.self_attn.q_proj") == DENSE
    assert found.of("lm_head") == HEAD
    assert found.of("model.layers.0.mlp.gate") is None


def test_what_is_not_quantized_has_no_scheme():
    found = schemes(dense=None, head=None)
    assert found.of("model.layers.0.self_attn.q_proj") is None and found.of("lm_head") is None
    assert found.of("model.layers.0.mlp.experts.0.down_proj") == EXPERTS


def test_a_rotation_is_told_of_all_that_it_turns():
    rotated = Scheme(4, 32, rotation=32)
    found = schemes(rotated, None, None)
    assert found.of("model.layers.0.mlp.experts.0.down_proj") == rotated
    assert found.of("model.layers.0.self_attn.q_proj") is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_stored_matrix_is_the_one_that_was_packed(bits, symmetric):
    scheme = Scheme(bits, 32, symmetric)
    stack = rtn(torch.randn(1, 7, 96), scheme, torch.bfloat16)
    name = "model.layers.0.mlp.experts.0.up_proj.weight"
    zero = None if stack.zero is None else stack.zero[0]
    stored = packed_tensors(name, stack.q[0], stack.scale[0], zero, bits)
    words = -(-96 * bits // 32)
    assert stored[f"{name}_packed"].shape == (7, words)
    assert stored[f"{name}_shape"].tolist() == [7, 96]
    assert (f"{name}_zero_point" in stored) != symmetric
    other = {"model.norm.weight": torch.ones(3)}
    back = unpacked_tensors(stored | other, schemes(scheme))
    assert back.keys() == {name, "model.norm.weight"}
    assert torch.equal(back[name], dequantize(stack)[0].float())


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"quant_method": "gptq"}, "not quantized in compressed-tensors format"),
        ({"format": "dense"}, "expected format 'pack-quantized', found 'dense'"),
        ({"format": "pack-quantized-rotated"}, ".* come together"),
        ({"config_groups": 3}, "bad quantization_config"),
    ],
)
def test_another_format_is_refused(changes, said):
    with pytest.raises(CheckpointError, match=f"folder: {said}"):
        schemes(**changes)
