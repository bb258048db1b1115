"""What a layer is stored as: packed in the family's names, changed in its dtype, else as it was."""

import torch
from helpers import save_random
from safetensors.torch import load_file

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import Scheme
from qmoe.model import experts
from qmoe.model.source import open_source
from qmoe.pipeline.shard import shard_tensors
from qmoe.solvers.rtn import rtn

SCHEME = Scheme(4, 32, False)
NORM = "model.layers.0.input_layernorm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


@torch.no_grad()
def test_tensors_of_a_quantized_layer(tmp_path, demo):
    path = save_random("mixtral", tmp_path / "m", demo, torch.bfloat16)
    source = open_source(ModelFolder(path), torch.bfloat16)
    before = load_file(path / "model.safetensors")
    names = source.weights.sources("model.layers.0")
    source.weights.load(names, torch.float32)
    module = source.model.get_submodule("model.layers.0.mlp.experts")
    source.model.get_parameter(NORM).mul_(2)
    packed = {
        f"model.layers.0.mlp.experts.{name}": rtn(
            experts.stack(module, name).float(), SCHEME, torch.bfloat16
        )
        for name in experts.expert_weights(module)
    }
    packed[Q] = rtn(source.model.get_parameter(Q).float()[None], SCHEME, torch.bfloat16)
    found = shard_tensors(source, names, packed, {NORM})

    gone = {n for n in names if ".experts." in n} | {Q}
    assert len(gone) == 3 * 4 + 1
    suffixes = ("_packed", "_scale", "_zero_point", "_shape")
    assert found.keys() == (set(names) - gone) | {n + s for n in gone for s in suffixes}
    assert torch.equal(found[NORM], 2 * before[NORM])
    assert found[NORM].dtype == torch.bfloat16  # as it was stored, not as it ran
    same = set(names) - gone - {NORM}
    assert len(same) >= 5 and all(torch.equal(found[n], before[n]) for n in same)

    first = packed["model.layers.0.mlp.experts.gate_up_proj"]
    for e in range(4):
        for name, rows in (("w1", slice(0, 96)), ("w3", slice(96, 192))):
            stored = f"model.layers.0.block_sparse_moe.experts.{e}.{name}.weight"
            assert torch.equal(found[f"{stored}_scale"], first.scale[e, rows])
            assert found[f"{stored}_shape"].tolist() == [96, 64]
    assert torch.equal(found[f"{Q}_scale"], packed[Q].scale[0])
