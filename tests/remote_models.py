"""Tiny models that are code of their own, from data/remote-code, saved as authors publish them."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

CODE = Path(__file__).parent / "data" / "remote-code"


def plain(**changes):
    """The model as a plain torch module, from the code where it lies."""
    sys.path.insert(0, str(CODE.parent))
    try:
        code = importlib.import_module(f"{CODE.name}.modeling_tiny_remote")
    finally:
        del sys.path[0]
    config = code.TinyRemoteConfig(**changes)
    return code.TinyRemoteForCausalLM(config).eval().requires_grad_(False)


def save(style, path, demo, **changes):
    """A folder as authors publish it; returns the model."""
    torch.manual_seed(0)
    model = plain(style=style, **changes)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        elif "norm" in name or "before" in name:
            parameter.normal_().exp_()
    path.mkdir()
    save_file(dict(model.state_dict()), path / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {
        "architectures": ["TinyRemoteForCausalLM"],
        "dtype": "float32",
        "auto_map": {
            "AutoConfig": "configuration_tiny_remote.TinyRemoteConfig",
            "AutoModelForCausalLM": "modeling_tiny_remote.TinyRemoteForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    for file in CODE.glob("*.py"):
        shutil.copyfile(file, path / file.name)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo / name, path / name)
    return model
