"""The best choice of widths for a number of bytes: a multiple-choice knapsack.

Each part of a model (a matrix of an expert, a linear) is stored in one of several ways, each with a
size and a cost; the sum of costs is to be least while the sum of sizes stays within the budget.
Solved by HiGHS (Huangfu and Hall, 2018) through SciPy, which also proves how far from the best the
answer can be at most.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from qmoe.errors import ConfigError

GAP = 1e-3  # of the best cost: what the search may leave
NODES = 20_000  # of the search, and no clock: equal runs choose alike
SLACK = 2e-6  # of the budget: twice what the solver takes for equal


@dataclass(frozen=True)
class Choice:
    """picked: of each part, which of its ways. gap: the cost is at most this share above the best
    possible."""

    picked: Int64[ndarray, " J"]
    nbytes: int
    cost: float
    gap: float


def allocate(nbytes: Int64[ndarray, "J C"], costs: Float[ndarray, "J C"], budget: int) -> Choice:
    """Pick one of C ways for each of J parts. A way that a part does not have has cost infinity.

    Raises ConfigError if the smallest ways together are above the budget.
    """
    J, C = nbytes.shape
    there = np.isfinite(costs)
    smallest = np.where(there, nbytes, np.iinfo(np.int64).max)
    least = int(smallest.min(1).sum())
    if least > budget:
        raise ConfigError(
            f"budget: the smallest the model can be is {least} bytes, which is {least - budget} "
            f"more than the {budget} that were given"
        )
    if least > budget * (1 - SLACK):  # the solver would find no room at all
        return _of(smallest.argmin(1), nbytes, costs)
    # Costs and sizes near 1, which the solver's tolerances are made for.
    scale = costs[there].max() or 1.0
    part = np.repeat(np.arange(J), C)
    once = csr_array((np.ones(J * C), (part, np.arange(J * C))), shape=(J, J * C))
    size = csr_array(nbytes.reshape(1, -1) / budget)
    lowest, highest = np.append(np.ones(J), 0), np.append(np.ones(J), 1 - SLACK)
    found = milp(
        np.where(there, costs, 0).ravel() / scale,
        integrality=np.ones(J * C),
        bounds=Bounds(0, there.ravel().astype(float)),
        constraints=LinearConstraint(vstack([once, size]), lowest, highest),
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    assert found.x is not None, found.message
    bound = found.mip_dual_bound * scale
    return _of(found.x.reshape(J, C).argmax(1), nbytes, costs, bound)


def _of(picked: ndarray, nbytes: ndarray, costs: ndarray, bound: float | None = None) -> Choice:
    """The choice of these ways. bound: no choice costs less; None for the only one there is."""
    rows = np.arange(len(picked))
    cost = float(costs[rows, picked].sum())
    gap = max(0.0, cost / bound - 1) if bound is not None and bound > 0 else 0.0
    return Choice(picked, int(nbytes[rows, picked].sum()), cost, gap)
