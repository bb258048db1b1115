"""Grouped GEMM over packed experts. Import the module you need; this one loads nothing.

Imported as `qmoe.kernels`. The version below matters only when the repository root is on sys.path:
transformers then takes this folder for Hugging Face's `kernels` and compares its version.
"""

from typing import Any

__version__ = "0"


def uses_arena(device: Any) -> bool:
    """Whether packed weights on this torch.device go through the Triton kernels (arena_stack.py)
    rather than torch's own (stack.py)."""
    return bool(device.type == "cuda")
