"""The knapsack beside trying everything."""

from itertools import product

import numpy as np
import pytest

from qmoe.errors import ConfigError
from qmoe.plan.allocate import GAP, allocate


def instance(J, C, seed):
    rng = np.random.default_rng(seed)
    nbytes = np.sort(rng.integers(1_000, 100_000, (J, C)), axis=1)
    costs = np.sort(rng.gamma(1.0, size=(J, C)), axis=1)[:, ::-1].copy()
    return nbytes, costs


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.0, 0.2, 0.6, 1.0])
def test_nothing_that_fits_is_better(seed, share):
    nbytes, costs = instance(6, 4, seed)
    costs[seed % 6, 3] = np.inf  # a way that this part does not have
    budget = int(nbytes.min(1).sum() * (1 - share) + nbytes.max(1).sum() * share) + 1
    found = allocate(nbytes, costs, budget)
    rows = np.arange(6)
    fits = [
        costs[rows, ways].sum()
        for ways in map(list, product(range(4), repeat=6))
        if nbytes[rows, ways].sum() <= budget
    ]
    assert found.nbytes <= budget and found.nbytes == nbytes[rows, found.picked].sum()
    assert found.cost == pytest.approx(costs[rows, found.picked].sum())
    assert min(fits) <= found.cost <= min(fits) * (1 + 2 * GAP) + 1e-9
    assert found.cost <= min(fits) * (1 + found.gap) + 1e-9


def test_too_little_is_said_to_the_byte():
    nbytes, costs = instance(5, 3, 0)
    least = int(nbytes.min(1).sum())
    with pytest.raises(ConfigError, match=f"{least} bytes, which is 7 more than the {least - 7}"):
        allocate(nbytes, costs, least - 7)


def test_a_model_of_many_experts_fills_its_budget():
    nbytes, costs = instance(3000, 6, 1)
    budget = int(nbytes.mean(1).sum())
    found = allocate(nbytes, costs, budget)
    assert 0.999 * budget < found.nbytes <= budget and found.gap <= 2 * GAP


def test_the_least_budget_has_one_choice():
    nbytes, costs = instance(7, 4, 0)
    costs[2, 0] = np.inf
    least = nbytes[:, 0].copy()
    least[2] = nbytes[2, 1]
    found = allocate(nbytes, costs, int(least.sum()))
    assert found.nbytes == least.sum() and found.picked.tolist() == [0, 0, 1, 0, 0, 0, 0]
