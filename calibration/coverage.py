"""What to do with experts that calibration hardly touched.

Policy: an expert with n < min_tokens routed tokens borrows tokens of its layer that were routed
elsewhere. They are run through the expert itself, so its second matrix sees its own activations,
and enter both Hessians with a total weight of (min_tokens - n) average tokens. The pull is strong
for an expert that saw nothing and fades to none at min_tokens: shrinkage towards what the layer
sees, never a switch to another method. Every expert treated so is reported.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from qmoe.calibration.routed_tokens import RoutedTokens
from qmoe.calibration.stats import ExpertStats


def borrow(
    stats: ExpertStats,
    middle: Callable[[int, Tensor], Tensor],
    min_tokens: int,
    average: float,
) -> list[int]:
    """Top up the Hessians of rare experts, in place; returns which experts those were.

    middle(e, x) gives the inputs [B, I] of expert e's second matrix. average: weight of a token
    (`average_weight` of the whole layer, since a rare expert's own average means nothing).
    """
    rare = [e for e, n in enumerate(stats.tokens.tolist()) if n < min_tokens]
    sample = stats.sample
    for e in rare:
        weight = borrowed_weight(stats.tokens[e], min_tokens, average, sample)
        stats.add_weighted(e, sample, middle(e, sample), weight)
    return rare


def borrowed_weight(
    tokens: Int[Tensor, ""], min_tokens: int, average: float, sample: Float[Tensor, "B H"]
) -> Float[Tensor, " B"]:
    """Of every token of the sample, for an expert with so few tokens of its own."""
    total = (min_tokens - int(tokens)) * average
    return torch.full((len(sample),), total / len(sample))


def average_weight(stats: ExpertStats | RoutedTokens) -> float:
    """Of a routed token of the layer."""
    return float(stats.weight.sum()) / max(int(stats.tokens.sum()), 1)
