"""Where and how packed weights run: what the options of `load` come to."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RunOn:
    """device: where products are computed.
    home: the memory that routed experts stay in, if it is another (packed/offload.py).
    exact: on a CPU, take activations as they are instead of rounding them to 8 bits.
    prepared: on a CPU, the buffers in the kernels' layout, if they need not be made from the stored
        tensors (packed/prepared.py), by the module's name and the place of the matrix in it."""

    device: torch.device
    home: torch.device | None = None
    exact: bool = False
    prepared: Mapping[str, Tensor] | None = None
