"""The whole model folders that scripts/fuzz/run.py spoils: tiny, sharded, of three families."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.measure.families import families, save_tiny

INDEX = "model.safetensors.index.json"
SHARDS = 3


def make_bases(folder: Path) -> dict[str, Path]:
    """Model folders by name; those named `quantized ..` are quantized."""
    encoders = {
        "qwen3_moe": (_plain, None),
        "gpt_oss": (_mxfp4, {"quant_method": "mxfp4"}),
        "deepseek_v3": (_fp8, {"quant_method": "fp8", "weight_block_size": [64, 128]}),
    }
    out = {}
    known = {family.model_type: family for family in families()}
    for name, (encode, encoding) in encoders.items():
        path = out[name] = folder / name
        save_tiny(known[name], path)
        tensors = encode(load_file(path / "model.safetensors"))
        (path / "model.safetensors").unlink()
        _shard(path, tensors)
        config = json.loads((path / "config.json").read_text())
        config |= {"dtype": "bfloat16"} | ({"quantization_config": encoding} if encoding else {})
        (path / "config.json").write_text(json.dumps(config, indent=2))
    text = folder / "text.txt"
    text.write_text("All happy families are alike. " * 40)
    calibration = CalibrationConfig(str(text), samples=2, seqlen=32, self_samples=0)
    for name, symmetric in (("qwen3_moe", True), ("gpt_oss", False)):
        config = QuantConfig(experts=Scheme(4, 32, symmetric), calibration=calibration)
        path = out[f"quantized {name}"] = folder / f"quantized-{name}"
        qmoe.quantize(out[name], path, config, progress=False)
        # Once here, so that no process of a case waits for an import.
        qmoe.load(path, progress=False)[0](input_ids=torch.arange(8)[None])
    return out


def _shard(path: Path, tensors: dict[str, Tensor]) -> None:
    names, where = sorted(tensors), {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = {n: tensors[n].contiguous() for n in names[i::SHARDS]}
        save_file(part, path / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.bfloat16() for n, t in tensors.items()}


def _fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every matrix of the layers in float8, in blocks of 64 x 128."""
    out = _plain(tensors)
    for name, tensor in tensors.items():
        if ".layers." in name and name.endswith("proj.weight") and tensor.dim() == 2:
            rows, columns = tensor.shape
            out[name] = tensor.to(torch.float8_e4m3fn)
            out[f"{name}_scale_inv"] = torch.rand(-(-rows // 64), -(-columns // 128)) + 0.5
    return out


def _mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every stack of experts in blocks of 32."""
    out = _plain(tensors)
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            del out[name]
            experts, columns, rows = tensor.shape
            shape = (experts, rows, columns // 32)
            out[f"{name}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8)
            out[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8)
    return out
