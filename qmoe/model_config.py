"""Reading config.json as transformers understands it, once it is known to be no trap.

Left out: what is in it (skeleton.py builds the model).
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from qmoe.bounds import check_counts
from qmoe.checkpoint import Checkpoint
from qmoe.errors import UnsupportedModelError
from qmoe.remote_code import needs_code

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


def first_line(error: Exception) -> str:
    """What a library's error says, in one line: its first, and what it announces with a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, second = [*lines, "", ""][:2]
    return f"{first} {second}" if first.endswith(":") else first or type(error).__name__
