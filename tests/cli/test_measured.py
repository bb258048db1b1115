"""The figures that the help states are those that a command wrote to docs/quality/quality.csv."""

import csv

import pytest
from conftest import ROOT

from qmoe.cli import measured


def row(method, bits, regime):
    """Of the Qwen3-MoE, seed 0."""
    with (ROOT / "docs" / "quality" / "quality.csv").open(newline="") as file:
        [found] = [
            r
            for r in csv.DictReader(file)
            if (r["model"], r["seed"], r["regime"]) == ("tiny-qwen3moe", "0", regime)
            and (r["method"], r["bits"]) == (method, str(bits))
        ]
    return found


@pytest.mark.parametrize("method", measured.PRESETS)
def test_presets(method):
    matched, mismatched = row(method, 2, "matched"), row(method, 2, "mismatched")
    shares = tuple(round(float(r["kl_over_rtn"]), 2) for r in (matched, mismatched))
    assert measured.PRESETS[method] == (*shares, round(float(matched["cpu_seconds"])))
    assert "{:.2f} / {:.2f}".format(*shares) in measured.METHODS


@pytest.mark.parametrize("method", measured.METHODS_KL)
def test_methods(method):
    found = (float(row(method, 4, regime)["kl"]) for regime in ("matched", "mismatched"))
    figures = tuple(round(1000 * kl, 2) for kl in found)
    assert measured.METHODS_KL[method] == figures
    assert "{:.2f} / {:.2f}".format(*figures) in measured.METHODS
