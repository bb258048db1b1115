"""What routed experts need besides their weights, for as many tokens as are computed at once."""

from collections.abc import Sequence

import torch

from qmoe.plan.sizes import Stack

# As in kernels/layer.py: bytes of weights that are expanded at once for large batches.
DENSE_CHUNK = 256 << 20


def workspace(
    parts: Sequence[Stack],
    dtype: torch.dtype,
    chosen: dict[str, int],
    tokens: int,
    gpu: bool,
) -> int:
    """The most bytes that the experts of a layer take for `tokens` tokens at once, an upper bound.

    parts: of the model (sizes.py). dtype: of activations. chosen: of each experts module, to how
    many experts a token goes. gpu: for the kernels of a GPU, or for those of a CPU.
    """
    bound = _on_gpu if gpu else _on_cpu
    modules: dict[str, list[Stack]] = {}
    for part in parts:
        modules.setdefault(part.module, []).append(part)
    each = (
        bound(modules[name][0].shape, modules[name][-1].shape, tokens, choices, dtype)
        for name, choices in chosen.items()
    )
    return max(each, default=0)


Shape = tuple[int, int, int]


def _on_gpu(first: Shape, second: Shape, tokens: int, choices: int, dtype: torch.dtype) -> int:
    """Rows of every assignment (kernels/layer.py): between the products and, in float32 or in the
    model's dtype, behind them; or, where a batch is large, what is multiplied as well, and weights
    that are expanded."""
    (E, N, K), (_, H, I), size = first, second, dtype.itemsize  # noqa: E741
    rows = tokens * choices
    fused = rows * ((N + 2 * I) * size + 4 * H)
    matrix = max(N * K, H * I) * size
    expanded = min(E * matrix, max(matrix, DENSE_CHUNK))
    dense = rows * (K + N + I + 2 * H) * size + expanded
    return max(fused, dense) + tokens * H * (4 + size)


def _on_cpu(first: Shape, second: Shape, tokens: int, choices: int, dtype: torch.dtype) -> int:
    """Rows of every assignment (kernels/cpu/csrc/job.c): inputs and what is between the products in
    up to float32, twice, and where the activation is not fused both sides of it."""
    (_, N, K), (_, H, I) = first, second  # noqa: E741
    rows = tokens * choices
    return rows * (4 * K + 8 * I + (N + I) * dtype.itemsize) + tokens * H * (4 + dtype.itemsize)
