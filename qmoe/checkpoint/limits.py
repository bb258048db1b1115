"""Counts in config.json that no checkpoint could fill, refused before memory is spent on them."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qmoe.errors import CheckpointError
from qmoe.system.sizes import format_size

# Keys that say how many of something there are, each with tensors of its own (experts may share
# theirs). Configs make lists as long as they say.
COUNTS = re.compile(r"layers?$|^depth$|experts?$|^num_labels$")
# Models have a few parameters for one checkpoint tensor at most, where it is split.
SPARE, PARTS = 1000, 4
BUFFERS = 1 << 30  # bytes of tables that a model computes (positions), with a small checkpoint


def check_counts(config: Any, tensors: int, where: str) -> None:
    """Raises CheckpointError if config.json, at any depth, asks for more layers or experts than
    tensors."""
    for key, value in config.items():
        if isinstance(value, dict):
            check_counts(value, tensors, where)
        elif COUNTS.search(key) is not None:
            for count in value if isinstance(value, list) else [value]:
                if isinstance(count, int | float) and count > max(tensors, SPARE):
                    raise CheckpointError(
                        f"{where}: config.json says {key} {str(count)[:20]}, the checkpoint has "
                        f"{tensors} tensors in all; correct config.json"
                    )


@contextmanager
def parameters_for(tensors: int, where: str) -> Iterator[None]:
    """While a model is built: CheckpointError when it has far more parameters than the checkpoint
    has tensors."""
    count, most = 0, PARTS * tensors + SPARE

    def registered(module: nn.Module, name: str, parameter: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise CheckpointError(
                f"{where}: by config.json the model has more than {most} parameters, the "
                f"checkpoint has {tensors} tensors; correct config.json"
            )

    hook = register_module_parameter_registration_hook(registered)
    try:
        yield
    finally:
        hook.remove()


def check_buffers(model: nn.Module, stored: int, where: str) -> None:
    """Raises CheckpointError if a model's computed tables, which are about to be made, would be
    larger than its checkpoint."""
    needed = sum(buffer.nbytes for buffer in model.buffers())
    if needed > max(stored, BUFFERS):
        raise CheckpointError(
            f"{where}: by config.json the model's tables of positions take {format_size(needed)}, "
            f"the checkpoint {format_size(stored)}; correct config.json"
        )
