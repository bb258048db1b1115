"""Hot experts and who computes the others, beside a search over all choices."""

import itertools
import random

import pytest

from qmoe.kernels.hosted.placement import ASSUMED, Rates, hit_rate, hottest, shared_out

COUNTS = {"a": [5.0, 90.0, 1.0], "b": [40.0, 30.0, 26.0]}
ALIKE = {"a": [10.0] * 3, "b": [10.0] * 3}


def test_one_ranking_over_all_layers():
    assert hottest(COUNTS, ALIKE, 30) == {"a": [1], "b": [0, 1]}
    assert hottest(COUNTS, ALIKE, 9) == {"a": [], "b": []}
    assert hottest(COUNTS, ALIKE, 10**9) == {"a": [0, 1, 2], "b": [0, 1, 2]}


def test_tokens_for_a_byte_decide():
    """Expert 1 of a is as often used as two others that take half its bytes together."""
    sizes = {"a": [10.0, 100.0, 10.0], "b": [10.0] * 3}
    assert hottest(COUNTS, sizes, 40) == {"a": [0], "b": [0, 1, 2]}


def test_without_counts_every_layer_gets_as_many():
    nothing = {name: [0.0] * 3 for name in COUNTS}
    assert hottest(nothing, ALIKE, 40) == {"a": [0, 1], "b": [0, 1]}


def test_the_hit_rate_is_a_share_of_assignments():
    assert hit_rate(COUNTS, {"a": [1], "b": [0, 1]}) == pytest.approx(160 / 192)
    assert hit_rate({"a": [0.0]}, {"a": [0]}) == 0


@pytest.mark.parametrize("seed", range(6))
def test_the_slower_side_is_done_as_early_as_any_choice_allows(seed):
    """The experts with most rows are copied, so that no other choice of as many is faster."""
    rng = random.Random(seed)
    rows = {e: rng.choice([1, 1, 2, 5, 40, 300]) for e in range(7)}
    nbytes = [1e6] * 9
    rates = Rates(1 / 25e9, 1 / 60e9, rng.choice([0.002, 0.02, 0.5]) / 60e9, "assumed")

    def seconds(copied):
        cpu = sum(rates.on_cpu(1e6, n) for e, n in rows.items() if e not in copied)
        return max(len(copied) * 1e6 * rates.copy, cpu)

    copied, computed = shared_out(rows, nbytes, rates)
    assert sorted([*copied, *computed]) == list(range(7))
    choices = [c for n in range(8) for c in itertools.combinations(range(7), n)]
    assert seconds(copied) == pytest.approx(min(map(seconds, choices)))


def test_few_rows_stay_on_the_cpu_and_many_are_copied():
    assert shared_out({3: 1}, [1e6] * 4, ASSUMED) == ([], [3])
    assert shared_out({3: 4096}, [1e6] * 4, ASSUMED) == ([3], [])
    assert shared_out({}, [], ASSUMED) == ([], [])
