"""The best choice of widths for a number of bytes: a multiple-choice knapsack.

Each part of a model (a matrix of an expert, a linear) is stored in one of several ways, each with a
size and a cost; the sum of costs is to be least while the sum of sizes stays within the budget.
Solved by HiGHS (Huangfu and Hall, 2018) through SciPy, which also proves how far from the best the
answer can be at most.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy import ndarray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, hstack

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


def allocate(
    nbytes: Int64[ndarray, "J C"],
    costs: Float[ndarray, "J C"],
    budget: int,
    alike: Sequence[str] | None = None,
    kinds: Sequence[bool] | None = None,
) -> Choice:
    """Pick one of C ways for each of J parts. A way that a part does not have has cost infinity.
    alike: a name for each part; all parts of one name get ways of one kind. kinds: that of each
    way; of the smallest ways of a part, which may be several, the last have one kind in a name.

    Raises ConfigError if the smallest ways together are above the budget.
    """
    J, C = nbytes.shape
    there = np.isfinite(costs)
    least = int(np.where(there, nbytes, np.iinfo(np.int64).max).min(1).sum())
    if least > budget:
        raise ConfigError(
            f"budget: the smallest the model can be is {least} bytes, which is {least - budget} "
            f"more than the {budget} that were given"
        )
    if least > budget * (1 - SLACK):  # the solver would find no room at all
        smallest = np.where(there, nbytes, np.iinfo(np.int64).max)[:, ::-1].argmin(1)
        return _of(C - 1 - smallest, nbytes, costs)
    # Costs and sizes near 1, which the solver's tolerances are made for.
    scale = costs[there].max() or 1.0
    part = np.repeat(np.arange(J), C)
    once = csr_array((np.ones(J * C), (part, np.arange(J * C))), shape=(J, J * C))
    size = csr_array(nbytes.reshape(1, -1) / budget)
    constraints = [LinearConstraint(once, 1, 1), LinearConstraint(size, 0, 1 - SLACK)]
    more = 0
    if alike is not None and kinds is not None:
        coupled = _coupled(alike, kinds)
        more = coupled.shape[1] - J * C
        constraints = [_wider(each, more) for each in constraints]
        constraints.append(LinearConstraint(coupled, 0, 0))
    highest = np.append(there.ravel().astype(float), np.ones(more))
    found = milp(
        np.append(np.where(there, costs, 0).ravel() / scale, np.zeros(more)),
        integrality=np.ones(J * C + more),
        bounds=Bounds(0, highest),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "node_limit": NODES},
    )
    assert found.x is not None, found.message
    bound = found.mip_dual_bound * scale
    return _of(found.x[: J * C].reshape(J, C).argmax(1), nbytes, costs, bound)


def _coupled(alike: Sequence[str], kinds: Sequence[bool]) -> csr_array:
    """Rows that are 0 where all parts of a name have ways of one kind: a column for each way of
    each part, then one for the kind of each name that several parts have."""
    J, C = len(alike), len(kinds)
    several = [name for name, count in Counter(alike).items() if count > 1]
    place = {name: J * C + i for i, name in enumerate(several)}
    rows, columns, values = list[int](), list[int](), list[float]()
    coupled = [j for j, name in enumerate(alike) if name in place]
    of_kind = [c for c, kind in enumerate(kinds) if kind]
    for row, j in enumerate(coupled):
        columns += [*(j * C + c for c in of_kind), place[alike[j]]]
        values += [*([1.0] * len(of_kind)), -1.0]
        rows += [row] * (len(of_kind) + 1)
    shape = (len(coupled), J * C + len(several))
    return csr_array((values, (rows, columns)), shape=shape)


def _wider(constraint: LinearConstraint, more: int) -> LinearConstraint:
    """The same with columns more that play no part."""
    empty = csr_array((constraint.A.shape[0], more))
    return LinearConstraint(hstack([constraint.A, empty]), constraint.lb, constraint.ub)


def _of(picked: ndarray, nbytes: ndarray, costs: ndarray, bound: float | None = None) -> Choice:
    """The choice of these ways. bound: no choice costs less; None for the only one there is."""
    rows = np.arange(len(picked))
    cost = float(costs[rows, picked].sum())
    gap = max(0.0, cost / bound - 1) if bound is not None and bound > 0 else 0.0
    return Choice(picked, int(nbytes[rows, picked].sum()), cost, gap)
