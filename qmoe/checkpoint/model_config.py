"""Reading config.json as transformers understands it, once it is known to be no trap, and the class
of model that it asks for.

Left out: what is in it (model/skeleton.py builds the model).
"""

import inspect
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    GenerationConfig,
    PreTrainedModel,
)

from qmoe.checkpoint.limits import check_counts
from qmoe.checkpoint.reader import Checkpoint
from qmoe.checkpoint.remote_code import needs_code, own_class
from qmoe.errors import CheckpointError, UnsupportedModelError

# A config that makes no sense fails wherever the family's code first trips over it.
CONFIG_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    OSError,
    ImportError,
    StrictDataclassError,
)


def read_config(checkpoint: Checkpoint, trust: bool = False) -> Any:
    """The transformers config of a model folder; UnsupportedModelError if transformers has none, or
    if the model is code of its own and `trust` does not allow that; CheckpointError if it asks for
    more layers than the checkpoint has tensors."""
    path = checkpoint.path
    own = needs_code(path, trust)
    check_counts(checkpoint.config, len(checkpoint.names()), str(path))
    if "configuration_files" in checkpoint.config:  # names of other files, anywhere
        raise UnsupportedModelError(
            f"{path}: config.json has configuration_files, the config must be in one file"
        )
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=own)
    except CONFIG_ERRORS as error:
        raise UnsupportedModelError(
            f"{path}: transformers cannot read this architecture: {first_line(error)}"
        ) from error


def generation_config(folder: Path) -> GenerationConfig | None:
    """How the model is to generate, if the folder says so; CheckpointError for a damaged file."""
    if not (folder / "generation_config.json").is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{folder}: bad generation_config.json: {error}") from error


def model_class(config: Any) -> Any:
    """The class of the whole model by what config.json says, so that a multimodal or an
    encoder-decoder model is complete. If it names none of this family, what transformers' auto
    classes choose: of one that reads more than text, the complete one. UnsupportedModelError if
    there is none."""
    if (own := own_class(config)) is not None:
        return own
    if (named := _named_class(config)) is not None:
        return named
    mappings = [MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING]
    composite = "text_config" in config.sub_configs
    mappings.insert(0 if composite else 2, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    for mapping in mappings:
        if (chosen := mapping.get(type(config), None)) is not None:
            return chosen
    raise UnsupportedModelError(
        f"{config.model_type}: transformers has no causal language model of this type"
    )


def _named_class(config: Any) -> Any:
    """The class of transformers that `architectures` names, if it is one of this family."""
    name = next(iter(config.architectures or []), "")
    named: Any = getattr(transformers, name, None) if name else None
    if not (inspect.isclass(named) and issubclass(named, PreTrainedModel)):
        return None
    own: Any = getattr(named, "config_class", None) or ()
    kinds = (type(config), *config.sub_configs.values())
    return named if any(issubclass(kind, own) for kind in kinds) else None


def first_line(error: Exception) -> str:
    """What a library's error says, in one line: its first, and what it announces with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, second = [*lines, "", ""][:2]
    return f"{first} {second}" if first.endswith(":") else first or type(error).__name__
