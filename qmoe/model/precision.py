"""What a model's class keeps in float32 while the rest runs in 16 bits: biases by which routers
choose, decay rates, attention sinks, some routers and norms.

transformers has two lists of them on every class, patterns of parameter names. One holds in float16
alone, the strict one in bfloat16 as well; `from_pretrained` reads both, a model that is built from
its config neither. Rounded to bfloat16, 256 biases around 7 are eight values, and a third of the
tokens go to other experts.
"""

import re
from collections.abc import Iterable
from typing import Any

import torch

LISTS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")


def in_float32(model: Any, dtype: torch.dtype, names: Iterable[str]) -> set[str]:
    """Of parameters and buffers by name, those that `from_pretrained(dtype=dtype)` has in
    float32."""
    return _matching(names, model._get_dtype_plan(dtype))


def ever_in_float32(model: Any) -> set[str]:
    """Parameters and buffers that it has there for some dtype. No quantizer in transformers touches
    them."""
    patterns = [p for name in LISTS for p in getattr(model, name, None) or []]
    return _matching(model.state_dict(), patterns)


def keep_in_float32(model: Any, dtype: torch.dtype) -> None:
    """Give a model without data, built in `dtype`, the dtypes that `from_pretrained` would give it.
    Whatever is loaded into it then has them too."""
    tensors = model.state_dict(keep_vars=True)
    for name in in_float32(model, dtype, tensors):
        tensors[name].data = tensors[name].data.float()


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    each = [re.compile(pattern.replace("*", ".*")) for pattern in patterns]
    return {name for name in names if any(pattern.search(name) for pattern in each)}
