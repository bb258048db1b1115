"""The knapsack (allocate.py) where some parts must be stored alike: the experts of a layer, of
which each may have its own bits, but all have one group size.

As one integer program that took minutes for a large model. Here Lagrange's multiplier, a price of a
byte, chooses the kinds, and the program is solved for those alone. The multiplier also gives the
bound that the answer is compared with.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy import ndarray

from qmoe.errors import ConfigError
from qmoe.plan.allocate import GAP, SLACK, Choice, allocate

STEPS = 60  # of the search for the price: to the last digits of a double


def allocate_alike(
    nbytes: Int64[ndarray, "J C"],
    costs: Float[ndarray, "J C"],
    budget: int,
    alike: Sequence[str],
    kinds: Sequence[bool],
) -> Choice:
    """As `allocate`, where all parts with one name in `alike` get ways of one kind. kinds: of each
    way. Every part has ways of both kinds, or has none with others.

    Raises ConfigError if the smallest ways together are above the budget.
    """
    _, names, count = np.unique(alike, return_inverse=True, return_counts=True)
    free, of_kind = (count == 1)[names], np.asarray(kinds, bool)
    either = [~of_kind, of_kind]

    def at(price: float) -> tuple[float, int, Bool[ndarray, " M"]]:
        """The least cost with bytes at this price, the bytes, and which names get the second kind.
        Of equal choices it is the one of fewer bytes."""
        total = costs + price * nbytes
        best = np.stack([np.where(kind, total, np.inf).min(1) for kind in either])
        picked = [_picked(np.where(kind, total, np.inf), nbytes) for kind in either]
        by_name = np.stack([np.bincount(names, weights=row) for row in best])
        second = by_name[1] <= by_name[0]
        taken = np.where(second[names], picked[1], picked[0])
        size = int(nbytes[np.arange(len(taken)), taken].sum())
        return float(by_name.min(0).sum()) - price * budget, size, second

    low, high = 0.0, 1e-30
    while at(high)[1] > budget * (1 - SLACK) and high < 1e30:
        low, high = high, high * 16
    for _ in range(STEPS):
        middle = (low * high) ** 0.5 if low else high / 16
        if at(middle)[1] > budget * (1 - SLACK):
            low = middle
        else:
            high = middle
    bound = max(at(low)[0], at(high)[0])

    def within(second: Bool[ndarray, " M"]) -> Choice:
        """The best choice where these names get the second kind."""
        is_open = free[:, None] | (second[names][:, None] == of_kind)
        found = allocate(nbytes, np.where(is_open, costs, np.inf), budget)
        return replace(found, gap=max(0.0, found.cost / bound - 1) if bound > 0 else found.gap)

    best, other = within(at(high)[2]), at(low)[2]
    if best.gap > GAP:
        with suppress(ConfigError):  # what is too large even at its smallest
            best = min(best, within(other), key=lambda choice: choice.cost)
    return best


def _picked(total: ndarray, nbytes: ndarray) -> Int64[ndarray, " J"]:
    """The cheapest way of each part; of equal ones that of fewer bytes."""
    cheapest = total == total.min(1, keepdims=True)
    found: ndarray = np.where(cheapest, nbytes, np.iinfo(np.int64).max).argmin(1)
    return found
