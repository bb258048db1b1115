"""How a running model keeps its cache."""

from typing import Literal

Kv = Literal["bf16", "int8"]  # keys and values as the model computes them, or in 8 bits
