"""The knapsack with parts that are stored alike, beside trying everything."""

from itertools import product

import numpy as np
import pytest

from qmoe.errors import ConfigError
from qmoe.plan.coupled import allocate_alike

KINDS = [False, False, True, True]


def instance(seed, J=7):
    """Ways of two kinds, of which the second takes fewer bytes and costs more."""
    rng = np.random.default_rng(seed)
    nbytes = np.sort(rng.integers(1_000, 100_000, (J, 2)), axis=1)
    costs = np.sort(rng.gamma(1.0, size=(J, 2)), axis=1)[:, ::-1]
    less, more = rng.uniform(0.7, 1.0, (2, J, 1))
    nbytes = np.concatenate([nbytes, (nbytes * less).astype(int)], axis=1)
    return nbytes, np.concatenate([costs, costs / more], axis=1)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7])
def test_near_the_best_that_fits_and_never_above_its_own_gap(seed, share):
    nbytes, costs = instance(seed)
    alike = ["a", "a", "a", "b", "b", "c", "d"]
    budget = int(nbytes.min(1).sum() * (1 - share) + nbytes.max(1).sum() * share) + 1
    found = allocate_alike(nbytes, costs, budget, alike, KINDS)
    rows, fits = np.arange(7), []
    for ways in map(list, product(range(4), repeat=7)):
        kinds = {(name, KINDS[way]) for name, way in zip(alike, ways, strict=True)}
        if len(kinds) == 4 and nbytes[rows, ways].sum() <= budget:
            fits.append(costs[rows, ways].sum())
    kinds = {(name, KINDS[way]) for name, way in zip(alike, found.picked, strict=True)}
    assert len(kinds) == 4 and found.nbytes <= budget
    # With so few parts, the price of a byte need not lead to the very best kinds.
    assert min(fits) - 1e-9 <= found.cost <= 1.35 * min(fits)
    assert found.cost <= min(fits) * (1 + found.gap) + 1e-9


def test_ways_that_are_missing_are_not_picked():
    nbytes, costs = instance(0)
    costs[:, 2:] = np.inf
    found = allocate_alike(nbytes, costs, int(nbytes[:, :2].sum(1).sum()), ["a"] * 7, KINDS)
    assert set(found.picked) <= {0, 1}


def test_many_experts_fill_the_budget():
    nbytes, costs = instance(1, 3000)
    alike = [f"layer {j // 250}" for j in range(3000)]
    found = allocate_alike(nbytes, costs, int(nbytes.mean(1).sum()), alike, KINDS)
    assert found.nbytes > 0.999 * int(nbytes.mean(1).sum()) and found.gap < 0.01


def test_too_little_is_an_error():
    nbytes, costs = instance(2)
    with pytest.raises(ConfigError, match="which is 1 more"):
        allocate_alike(nbytes, costs, int(nbytes.min(1).sum()) - 1, ["a"] * 7, KINDS)
