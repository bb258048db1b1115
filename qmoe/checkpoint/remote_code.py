"""Models that come with their own code: modeling_*.py beside the weights, named by `auto_map` in
config.json. Such code runs only if the caller says so, and only where transformers has no class
for the model.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from qmoe.checkpoint.folders import read_json
from qmoe.errors import CheckpointError, UnsupportedModelError

HEAD = "AutoModelForCausalLM"


def needs_code(path: Path, trust: bool) -> bool:
    """Whether the model in this folder is code of its own. Raises UnsupportedModelError if it is
    and may not run, or if the code lies elsewhere; CheckpointError if config.json's model_type is
    no name or its architectures are no list of names."""
    config = read_json(path / "config.json")
    kind, classes = config.get("model_type", ""), config.get("architectures") or []
    where = f"{path}: config.json"
    if not isinstance(kind, str):
        raise CheckpointError(f"{where}: model_type: expected a name, got {kind!r:.100}")
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(
            f"{where}: architectures: expected a list of names, got {classes!r:.100}"
        )
    named = own_code(config)
    if not named:
        return False
    if elsewhere := [reference for reference in named.values() if "--" in reference]:
        raise UnsupportedModelError(
            f"{path}: config.json names code of another repository ({elsewhere[0]}); put the files "
            "beside the weights, and name them there without what comes before '--'"
        )
    if not trust:
        raise UnsupportedModelError(
            f"{path}: transformers has no class for this model; the folder wants to run code of "
            f"its own ({', '.join(named.values())}). Read it: it can do whatever you can. "
            "--trust-remote-code (in Python trust_remote_code=True) allows it"
        )
    return True


def own_code(config: dict[str, Any]) -> dict[str, str]:
    """The classes that config.json names for want of any in transformers, by auto class."""
    auto_map = config.get("auto_map")
    named = auto_map if isinstance(auto_map, dict) else {}
    found = {k: str(v) for k, v in named.items() if k in ("AutoConfig", HEAD)}
    architecture = next(iter(config.get("architectures") or []), "")
    known = HEAD not in found or not architecture or hasattr(transformers, architecture)
    return {} if config.get("model_type") in CONFIG_MAPPING_NAMES and known else found


def own_class(config: Any) -> Any:
    """The model's class, if it is code of its own (which `needs_code` allowed), or None."""
    named_in = {name: getattr(config, name, None) for name in ("auto_map", "architectures")}
    named = own_code(named_in | {"model_type": config.model_type}).get(HEAD)
    return named and get_class_from_dynamic_module(named, config.name_or_path)


def code_digest(path: Path) -> str:
    """SHA-256 of the code in a folder."""
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*.py")):
        sha.update(f"{file.relative_to(path)} {file.stat().st_size}".encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules made here keep what they compute in their constructors, such as rotary frequencies:
    transformers computes those again only for classes written for it. Parameters have no data."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            empty = torch.empty_like(parameter, device="meta")
            parameter = nn.Parameter(empty, parameter.requires_grad)
        original(self, name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
