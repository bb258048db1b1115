"""A model on the meta device, and inputs for it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from qmoe.checkpoint.limits import check_buffers, parameters_for
from qmoe.checkpoint.model_config import CONFIG_ERRORS, first_line, model_class
from qmoe.checkpoint.reader import Checkpoint
from qmoe.checkpoint.remote_code import parameters_on_meta
from qmoe.errors import UnsupportedModelError
from qmoe.model.adapters import adapt
from qmoe.model.precision import keep_in_float32


def inputs_of(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Arguments of a forward pass over token ids [B, L]; a decoder that has an encoder reads the
    same text."""
    inputs: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    return inputs


def build(config: Any, dtype: torch.dtype, checkpoint: Checkpoint | None = None) -> Any:
    """The model with every parameter on the meta device and its computed buffers (rotary
    frequencies and the like) real. checkpoint: what it is for: it bounds the size, and is shown in
    the form that the model has (adapters.py)."""
    bounded: AbstractContextManager[None] = nullcontext()
    if checkpoint is not None:
        bounded = parameters_for(len(checkpoint.names()), str(checkpoint.path))
    try:
        kind = model_class(config)
        own = kind.is_custom_code()
        with parameters_on_meta() if own else torch.device("meta"), bounded:
            model: Any = kind._from_config(config, dtype=dtype)
    except CONFIG_ERRORS as error:
        raise UnsupportedModelError(
            f"{config.model_type}: transformers cannot build a language model from this "
            f"config: {type(error).__name__}: {first_line(error)}"
        ) from error
    if checkpoint is not None:
        check_buffers(model, checkpoint.nbytes(), str(checkpoint.path))
    if not own:
        _compute_buffers(model)
    return settle(model, dtype, checkpoint)


def settle(model: Any, dtype: torch.dtype, checkpoint: Checkpoint | None = None) -> Any:
    """A model on the meta device, of transformers or of `build`, given the dtypes that it runs in
    and the form that qmoe reads (adapters.py), in which the checkpoint is shown too."""
    keep_in_float32(model, dtype)
    made = adapt(model)
    if checkpoint is not None:
        checkpoint.show(made)
    return model.eval().requires_grad_(False)


def _compute_buffers(model: Any) -> None:
    """As from_pretrained does after loading: buffers that no checkpoint holds are computed by the
    model's own initialization, which leaves alone whatever is marked as initialized."""
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()


def free(module: nn.Module) -> None:
    """Put every parameter of `module` back on the meta device. Buffers stay: they are computed."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            empty = torch.empty_like(parameter, device="meta")
            part._parameters[name] = nn.Parameter(empty, requires_grad=False)
