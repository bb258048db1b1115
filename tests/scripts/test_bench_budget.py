"""A planned model beside the uniform ones of the same samples."""

import importlib.util

import pytest
from conftest import ROOT

spec = importlib.util.spec_from_file_location("bench_budget", ROOT / "scripts" / "bench_budget.py")
bench_budget = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench_budget)


def row(kind, bits, nbytes, kl, regime="matched"):
    about = {"preset": "fast", "regime": regime, "seed": 0}
    return about | {"kind": kind, "bits": bits, "bytes": nbytes, "kl": kl}


def test_ratios_are_to_the_same_bytes_or_to_the_line_between():
    rows = [
        row("uniform", 2.14, 100, 1e-2),
        row("uniform", 3.148, 200, 1e-4),
        row("uniform", 2.6, 150, 1.0, "mismatched"),  # has no part in it
        row("planned", 3.147, 199, 5e-5),
        row("planned", 2.6, 150, 5e-4),
        row("planned", 5.0, 400, 1e-9),
    ]
    bench_budget._relate(rows)
    assert [r["ratio"] for r in rows[:3]] == [""] * 3
    assert rows[3]["ratio"] == 0.5  # of the uniform model that is as large
    assert rows[4]["ratio"] == pytest.approx(0.5)  # of 1e-3, half way on a logarithmic scale
    assert rows[5]["ratio"] == ""  # beyond the largest
