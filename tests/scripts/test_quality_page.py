"""The tables of docs/quality/README.md and of the README have the figures of quality.csv."""

import csv
import re

import pytest
from conftest import ROOT

MODELS = ("tiny-qwen3moe", "tiny-mixtral")
REGIMES = ("matched", "mismatched")


def read_rows():
    with (ROOT / "docs" / "quality" / "quality.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = ("model", "regime", "method", "bits", "seed")
    return {tuple(row[k] for k in keys): row for row in rows}


ROWS = read_rows()


def row(model, regime, method, bits):
    return ROWS[model, regime, method, str(bits), "0"]


def tables():
    """The header and the rows of every table on the page, as lists of cells."""
    page = (ROOT / "docs" / "quality" / "README.md").read_text()
    for found in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in found.splitlines()]
        yield lines[0], lines[2:]


def worst(model, method, bits):
    """The largest share of round-to-nearest's KL of any domain, mismatched."""
    ours, rtn = row(model, "mismatched", method, bits), row(model, "mismatched", "rtn", bits)
    return max(float(ours[k]) / float(rtn[k]) for k in ours if re.fullmatch("kl_[a-z]+", k)
               and k not in ("kl_rare", "kl_over_rtn"))  # fmt: skip


def assert_shown(cell, value, digits):
    """A cell is the value, to within what the CSV's six digits leave open."""
    assert abs(float(cell) - float(value)) <= 0.500001 * 10**-digits, (cell, value)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_methods(bits):
    wanted = [f"{bits} bits", "bits per weight"]
    [body] = [body for header, body in tables() if header[:2] == wanted]
    assert len(body) >= 12
    for method, per_weight, *cells in body:
        assert_shown(per_weight, row(MODELS[0], "matched", method, bits)["bits_per_weight"], 2)
        for model, (matched, mismatched, most) in zip(MODELS, (cells[:3], cells[3:]), strict=True):
            for regime, cell in zip(REGIMES, (matched, mismatched), strict=True):
                assert_shown(cell, row(model, regime, method, bits)["kl_over_rtn"], 3)
            assert_shown(most, worst(model, method, bits), 2)


def test_pieces_of_balanced():
    [body] = [body for header, body in tables() if header[0] == "2 bits" and "rare" in header[3]]
    assert len(body) >= 10
    for method, *cells in body:
        for model, (matched, mismatched, rare) in zip(MODELS, (cells[:3], cells[3:]), strict=True):
            if (model, "matched", method, "2", "0") not in ROWS:  # not measured
                assert {matched, mismatched, rare} == {"-"}, method
                continue
            assert_shown(matched, row(model, "matched", method, 2)["kl_over_rtn"], 3)
            assert_shown(mismatched, row(model, "mismatched", method, 2)["kl_over_rtn"], 3)
            assert_shown(rare, row(model, "mismatched", method, 2)["kl_rare_over_rtn"], 3)


def test_routing():
    [body] = [body for header, body in tables() if "of the original's experts" in header[0]]
    for method, *cells in body:
        places = [(model, bits) for model in MODELS for bits in (2, 3, 4)]
        for (model, bits), cell in zip(places, cells, strict=True):
            assert_shown(cell, row(model, "matched", method, bits)["router_agreement"], 4)


def test_presets_in_the_readme():
    found = re.findall(
        r"^\| `(fast|balanced|best)`.*\| ([\d.]+) \| ([\d.]+) \| (\d+) \|$",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    assert [preset for preset, *_ in found] == ["fast", "balanced", "best"]
    for preset, matched, mismatched, seconds in found:
        method = "gptq" if preset == "fast" else preset
        assert_shown(matched, row(MODELS[0], "matched", method, 2)["kl_over_rtn"], 2)
        assert_shown(mismatched, row(MODELS[0], "mismatched", method, 2)["kl_over_rtn"], 2)
        assert_shown(seconds, row(MODELS[0], "matched", method, 2)["cpu_seconds"], 0)
