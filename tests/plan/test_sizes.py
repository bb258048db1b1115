"""What a quantized model is said to take, beside what it takes."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import save_random, slow
from safetensors.torch import load_file, save_file

import qmoe
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import CHANNEL, QuantConfig, Scheme
from qmoe.model.source import open_source
from qmoe.plan.sizes import sizes, stacks


@pytest.mark.parametrize("family", [slow("mixtral"), "gpt_oss", slow("deepseek_v3"), "qwen2_moe"])
@pytest.mark.parametrize(
    "experts, lm_head", [(Scheme(4, 32), None), (Scheme(3, 32, False), Scheme(8, CHANNEL))]
)
def test_sizes_are_those_of_the_files(demo, tmp_path, family, experts, lm_head):
    source = save_random(family, tmp_path / "m", demo, torch.bfloat16)
    config = QuantConfig(method="rtn", experts=experts, lm_head=lm_head)
    opened = open_source(ModelFolder.find(source), torch.float32)
    told = sizes(opened, config, stacks(opened, config))
    qmoe.quantize(source, tmp_path / "q", config, progress=False)
    files = list((tmp_path / "q").glob("*.safetensors"))
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in files)
    data = sum(f.stat().st_size for f in files) - headers
    assert told.tensors == data
    assert headers <= told.headers <= 1.1 * headers + 64 * len(files)


def test_layers_that_the_model_does_not_have_are_counted_apart(demo, tmp_path):
    """As DeepSeek-V3's prediction layer, which is stored behind the last one."""
    source = save_random("deepseek_v3", tmp_path / "m", demo, torch.bfloat16)
    found = []
    for _ in range(2):
        opened = open_source(ModelFolder.find(source), torch.float32)
        config = QuantConfig(experts=Scheme(4, 32))
        found.append(sizes(opened, config, stacks(opened, config)))
        values = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
        (source / "config.json").write_text(json.dumps(values))
        file = source / "model.safetensors"
        tensors = load_file(file)
        more = {
            name.replace("layers.1.", "layers.2."): tensor.clone()
            for name, tensor in tensors.items()
            if "layers.1." in name
        }
        more["model.layers.2.eh_proj.weight"] = torch.zeros(64, 128)
        save_file(tensors | more, file, metadata={"format": "pt"})
    assert found[1].prediction == sum(tensor.nbytes for tensor in more.values())
    assert found[0] == replace(found[1], prediction=0, headers=found[0].headers)
