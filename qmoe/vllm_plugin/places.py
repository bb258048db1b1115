"""Places in a layer of vLLM for a checkpoint's tensors, which wait there until all have come.

vLLM's own parameters have one size for all matrices that they join, and its loaders cut them as
they arrive. Here tensors are kept as they come (they lie in the mapped file, so they take no
memory), and cut when the whole layer is there, because zero points and experts of several widths
can only be cut then.
"""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

LOADED = "qmoe_loaded"  # attribute of a layer: by matrix and suffix, the tensors that have come
Loader = Callable[..., Any]


# Of stored tensors that are not in the dtype of the scales.
DTYPES = {"_packed": torch.int32, "_zero_point": torch.int32, "_shape": torch.int64}


def place(layer: nn.Module, name: str, suffix: str, dtype: torch.dtype, loader: Loader) -> None:
    """An empty parameter with this name and suffix, whose tensors go to `loader` as vLLM calls it.
    dtype: of scales; vLLM warns of tensors that have another dtype than their parameter."""
    empty = torch.empty(0, dtype=DTYPES.get(suffix, dtype))
    parameter: Any = nn.Parameter(empty, requires_grad=False)
    parameter.weight_loader = loader
    layer.register_parameter(name + suffix, parameter)


def keep(layer: nn.Module, matrix: Hashable, suffix: str, tensor: Tensor) -> None:
    """A tensor of one of the layer's matrices that has come."""
    loaded: dict[Hashable, dict[str, Tensor]] = layer.__dict__.setdefault(LOADED, {})
    loaded.setdefault(matrix, {})[suffix] = tensor


def take(layer: nn.Module, device: torch.device) -> dict[Hashable, dict[str, Tensor]]:
    """All tensors that have come, on the device; the layer keeps none of them."""
    loaded: dict[Hashable, dict[str, Tensor]] = layer.__dict__.pop(LOADED, {})
    return {
        matrix: {suffix: t if suffix == "_shape" else t.to(device) for suffix, t in each.items()}
        for matrix, each in loaded.items()
    }
