"""Which MoE families the installed transformers has, and a tiny random model of each.

Left out: the proof that qmoe handles them (family_check.py).
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedTokenizerFast
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)

from qmoe.checkpoint.model_config import model_class
from qmoe.measure.tiny_sizes import CHANGES, KINDS, SMALL
from qmoe.model.precision import ever_in_float32
from qmoe.model.skeleton import build
from qmoe.model.structure import find
from qmoe.model.tensor_names import stored_fused

EXPERTS = re.compile(r"^class \w*(?:Experts|CDMoE)\(", re.MULTILINE)
# Model heads by what they read; a family is checked with the first that it has.
HEADS = {
    "text": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "text to text": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image and text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}

# Names of what is added to a router's scores before experts are chosen. (Not ZAYA's, one of which
# transformers sets to -1 after loading.)
CHOOSING = re.compile(r"correction_bias|expert_bias")


@dataclass(frozen=True)
class Family:
    """model_type as in config.json; reads: a key of HEADS; head: the class of the whole model."""

    model_type: str
    reads: str
    head: str


@cache
def families() -> tuple[Family, ...]:
    """Every language model with routed experts, found in the sources of transformers."""
    folder = Path(transformers.__file__).parent / "models"
    found = []
    for model_type in CONFIG_MAPPING_NAMES:
        module = model_type_to_module_name(model_type)
        source = folder / module / f"modeling_{module}.py"
        if not source.is_file() or not EXPERTS.search(source.read_text(encoding="utf-8")):
            continue
        composite = "text_config" in CONFIG_MAPPING[model_type].sub_configs
        for reads in sorted(HEADS, reverse=not composite):
            head = HEADS[reads].get(model_type)
            if head is not None:
                found.append(Family(model_type, reads, head))
                break
    return tuple(sorted(found, key=lambda family: family.model_type))


def tiny_config(family: Family) -> Any:
    """A config of the family with every size small, and two layers."""
    kind = CONFIG_MAPPING[family.model_type]
    values = _shrunk(kind().to_dict())
    values.get("text_config", values).update(CHANGES.get(family.model_type, {}))
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        values.pop(name, None)
    config = kind(**values)
    config.architectures = [family.head]
    return config


def _shrunk(values: dict[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    depth = values.get("num_hidden_layers")
    for name, value in values.items():
        if name == "per_layer_config":
            continue
        if isinstance(value, dict) and name.endswith("_config"):
            out[name] = _shrunk(value)
        elif name in KINDS and value:
            kinds = list(dict.fromkeys(value))
            out[name] = [kinds[0], kinds[-1]]
        elif name in SMALL and value is not None:
            out[name] = [SMALL[name]] * 2 if isinstance(value, list) else SMALL[name]
        elif isinstance(value, list) and len(value) == depth:
            out[name] = value[:2]
        else:
            out[name] = value
    return out


def layout(family: Family) -> str:
    """How the family's experts are stored and computed, in a few words. Raises
    UnsupportedModelError if qmoe cannot handle it."""
    model = build(tiny_config(family), torch.float32)
    words: dict[str, None] = {}
    for layer in find(model).layers:
        words |= dict.fromkeys(["a module per expert"] * bool(layer.unfused))
        vectors = any(isinstance(model.get_submodule(n), nn.Embedding) for n in layer.unquantized)
        words |= dict.fromkeys(["vectors, kept in 16 bits"] * vectors)
        for name in layer.experts:
            module = model.get_submodule(name)
            told = {
                "fused": stored_fused(model),
                "transposed": module.is_transposed,
                "interleaved": not module.is_concatenated,
                "biased": module.has_bias,
                "ungated": not module.has_gate,
                "post-normed": module.has_post_expert_norm,
            }
            words |= dict.fromkeys(word for word, present in told.items() if present)
    return ", ".join(words) or "a matrix per expert"


@torch.no_grad()
def save_tiny(
    family: Family,
    path: Path,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    config: Any = None,
) -> None:
    """Write a random tiny model of the family, as its authors would, with a tokenizer of bytes.
    config: its sizes (default: those of `tiny_config`).
    What its class keeps in float32, and biases by which routers choose, are float32 in any dtype;
    these biases are as far from zero as training takes them, where bfloat16 hardly tells them
    apart."""
    config = config or tiny_config(family)
    torch.manual_seed(seed)
    model: Any = model_class(config)._from_config(config, dtype=torch.float32)
    parameters, kept = dict(model.named_parameters()), ever_in_float32(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if CHOOSING.search(name) and tensor.is_floating_point():
            tensor.data.uniform_(6.817, 7.063)
            if "balancing_bias" in name:  # ZAYA's last one is always this in transformers
                tensor.data[-1] = -1.0
            continue
        if name not in parameters:
            continue
        if tensor.dim() > 1:  # default initialization is so small that routing is a tie
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
        elif "norm" in name:
            tensor.normal_().exp_()
        else:
            tensor.normal_(std=0.1)
        if name not in kept:
            tensor.data = tensor.to(dtype)
    config.dtype = dtype
    model.save_pretrained(path)
    bytes_only = Tokenizer(
        models.BPE(
            {c: i + 1 for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []
        )
    )
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(path)
