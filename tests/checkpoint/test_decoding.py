"""Checkpoints in their makers' 8- and 4-bit formats give what their decoded twins give."""

import json

import pytest
import torch
from helpers import slow
from safetensors.torch import load_file, save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.checkpoint.decoding import fp8, mxfp4
from qmoe.checkpoint.reader import Checkpoint
from qmoe.errors import CheckpointError
from qmoe.measure.families import families, save_tiny

CONFIG = QuantConfig(method="rtn", experts=Scheme(4, 32))


def family(name):
    return next(f for f in families() if f.model_type == name)


def rewrite(folder, tensors, encoding):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "bfloat16"}
    if encoding is not None:
        config["quantization_config"] = encoding
    (folder / "config.json").write_text(json.dumps(config))


def as_fp8(plain):
    """Every matrix of the layers in float8 with blocks of 64 x 128, as DeepSeek-V3 stores them."""
    encoded, decoded = {}, {}
    for name, tensor in plain.items():
        tensor = tensor.bfloat16()
        if ".layers." in name and name.endswith("proj.weight") and tensor.dim() == 2:
            N, K = tensor.shape
            scale = torch.rand(-(-N // 64), -(-K // 128)) + 0.5
            encoded[name] = tensor.to(torch.float8_e4m3fn)
            encoded[f"{name}_scale_inv"] = scale
            each = torch.kron(scale, torch.ones(64, 128))[:N, :K]
            decoded[name] = (encoded[name].float() * each).bfloat16()
        else:
            encoded[name] = decoded[name] = tensor
    return encoded, decoded


def as_mxfp4(plain):
    """Every stack of experts in blocks of 32, as gpt-oss stores them."""
    encoded, decoded = {}, {}
    for name, tensor in plain.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            E, K, N = tensor.shape
            blocks = torch.randint(256, (E, N, K // 32, 16), dtype=torch.uint8)
            scales = torch.randint(118, 124, (E, N, K // 32), dtype=torch.uint8)
            encoded |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            decoded[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
        else:
            encoded[name] = decoded[name] = tensor.bfloat16()
    return encoded, decoded


FORMATS = {
    "deepseek_v3": (as_fp8, {"quant_method": "fp8", "weight_block_size": [64, 128]}),
    "gpt_oss": (as_mxfp4, {"quant_method": "mxfp4"}),
}


@pytest.mark.parametrize("name", FORMATS)
def test_an_encoded_model_equals_its_decoded_twin(name, tmp_path):
    encode, encoding = FORMATS[name]
    folders = tmp_path / "encoded", tmp_path / "decoded"
    for folder in folders:
        save_tiny(family(name), folder)
    made = encode(load_file(folders[0] / "model.safetensors"))
    rewrite(folders[0], made[0], encoding)
    rewrite(folders[1], made[1], None)
    outputs = []
    for folder in folders:
        qmoe.quantize(folder, tmp_path / f"{folder.name}-q", CONFIG, progress=False)
        shards = sorted((tmp_path / f"{folder.name}-q").glob("*.safetensors"))
        outputs.append({k: v for shard in shards for k, v in load_file(shard).items()})
    assert outputs[0] and outputs[0].keys() == outputs[1].keys()
    assert all(torch.equal(outputs[0][key], outputs[1][key]) for key in outputs[0])
    config = json.loads((tmp_path / "encoded-q" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_fp8_against_transformers():
    weight = torch.randn(256, 384).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.bfloat16)
    assert torch.equal(fp8(weight, scale, [128, 128]), expected)


def test_mxfp4_of_every_byte_and_exponent():
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 4, 4, 16)
    scales = torch.randint(1, 254, (1, 4, 4), dtype=torch.uint8)
    assert torch.equal(mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (lambda t: t.pop("model.layers.0.mlp.experts.down_proj_scales"), "and its scales None"),
        slow(lambda t: t.update(x_blocks=torch.zeros(3, 3)), "x_blocks has shape"),
    ],
)
def test_encoded_parts_that_do_not_fit(spoil, complaint, tmp_path):
    save_tiny(family("gpt_oss"), tmp_path)
    tensors = as_mxfp4(load_file(tmp_path / "model.safetensors"))[0]
    spoil(tensors)
    rewrite(tmp_path, tensors, {"quant_method": "mxfp4"})
    with pytest.raises(CheckpointError, match=complaint):
        Checkpoint(tmp_path).decode()
