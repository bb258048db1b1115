"""The page of `qmoe report`: its sections, that it needs nothing from anywhere, that it can be read
in light, in dark and on a telephone, and what it says of folders with little or no record."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from helpers import LITTLE_TEXT

import qmoe
from qmoe.cli.main import main
from qmoe.errors import CheckpointError, ConfigError, OutputError
from qmoe.html_report.facts import gather, short
from qmoe.html_report.plots import LINES, heat_map
from qmoe.html_report.report import HERE, report
from qmoe.packed.measured import MEASURED

TITLES = [
    "Quality", "Use of experts", "Coverage", "Errors", "Routing", "Bytes and bits",
    "Memory and speed", "Fallbacks and unpacked bytes", "Provenance",
]  # fmt: skip
# Elements without an end tag.
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Titles of sections, ids, what attributes and elements refer to, and text. Raises
    AssertionError where an end tag closes another element than the last one opened."""

    def __init__(self, html):
        super().__init__()
        self.open, self.titles, self.ids, self.refers, self.text = [], [], [], [], []
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        for key in ("href", "src", "xlink:href", "srcset", "data", "action", "poster"):
            self.refers += [found[key]] if key in found else []
        self.refers += re.findall(r"url\(([^)]*)\)", found.get("style") or "")
        self.refers += re.findall(r"url\(([^)]*)\)", found.get("clip-path") or "")
        assert tag not in ("script", "iframe", "link", "object", "embed")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)
        self.text.append(data)


@pytest.fixture(scope="module")
def measured(quantized_short, tmp_path_factory):
    """A quantized folder with what `eval --save` and `bench --save` keep."""
    folder = tmp_path_factory.mktemp("measured") / "q4"
    shutil.copytree(quantized_short, folder)
    names = [f"model.layers.{i}.mlp.experts" for i in range(2)]
    counts = {name: list(range(16)) for name in names}
    rows = {"perplexity": 12.5, "loss": 2.5, "kl": 0.0125, "agreement": 0.975}
    german = {name: counts[name][::-1] for name in names}
    scores = {"austen": rows, "german": rows | {"perplexity": None}}
    speed = {"prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 50.0}
    settings = {"prompt": 64, "tokens": 8, "batch": 1, "threads": 1, "device": "cpu"}
    found = {
        "eval": {
            "scores": {"original": scores, "qmoe": scores},
            "overall": {"original": rows, "qmoe": rows},
            "not_better": ["austen: perplexity is not below that of rtn"],
            "settings": {"samples": 1, "seqlen": 256, "dtype": "float32"},
            "experts_used": {"austen": counts, "german": german},
            "routing_kept": dict.fromkeys(names, 0.99),
        },
        "bench": {
            "models": {"qmoe": speed | {"weights_in_memory": 5000, "peak_over_bare_process": 9}},
            "settings": settings,
            "machine": "a CPU",
            "kernels": "C kernels",
            "planned": {"parts": [["routed experts", 4000]], "weights": 5000},
        },
    }
    (folder / MEASURED).write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def other(short, tmp_path_factory):
    """The same model, rounded to nearest in 2 bits."""
    folder = tmp_path_factory.mktemp("other") / "q2"
    config = qmoe.QuantConfig(method="rtn", experts=qmoe.Scheme(2, 32, symmetric=False))
    qmoe.quantize(short, folder, config, progress=False)
    return folder


def check_alone(html):
    """The page is well-formed, and refers to nothing but its own parts."""
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    for target in page.refers:
        target = target.strip("'\"")
        assert target.startswith("data:image/png;base64,") or target[1:] in page.ids, target[:80]
    assert "@import" not in html
    for url in set(re.findall(r"https?://[^\"' <)]+", html)):  # of namespaces: nothing loads them
        assert url.startswith(("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")), url
    return page


def test_all_sections_are_there_and_nothing_comes_from_elsewhere(measured):
    page = check_alone(report(measured).html)
    assert page.titles == TITLES
    text = " ".join(page.text)
    for said in ("0.01250", "infinite", "is not below that of rtn", "Domain german.", "99.00%",
                 "of 16 experts borrowed", "model.embed_tokens.weight", "damp"):  # fmt: skip
        assert said in text, said


def test_equal_folders_give_equal_pages(measured):
    assert report(measured).html == report(measured).html


def test_what_was_not_recorded_is_said_with_the_command_that_records_it(quantized_short):
    page = check_alone(report(quantized_short).html)
    assert page.titles == TITLES
    text = " ".join(page.text)
    assert "qmoe eval q4 --against source --save" in text
    assert "qmoe bench q4 --against source --save" in text


def test_a_budget_shows_its_curve(measured, tmp_path):
    folder = tmp_path / "sized"
    shutil.copytree(measured, folder)
    told = json.loads((folder / "qmoe_report.json").read_text())
    kl = {"planned": {"overall": 0.0125, "p99": 0.25}, "uniform": {"overall": 0.05, "p99": 0.75}}
    told["budget"] = {
        "written": "planned", "kl": kl, "predicted_kl": 0.0075,
        "bits": {"planned": 3.1, "uniform": 3},
        "weight_files": {"planned": 10**6, "uniform": 999 * 10**3},
        "curve": [{"bytes": 1, "bits": 2.1, "predicted_kl": 0.1},
                  {"bytes": 2, "bits": 8.1, "predicted_kl": 0.0}],
    }  # fmt: skip
    (folder / "qmoe_report.json").write_text(json.dumps(told))
    page = check_alone(report(folder).html)
    assert page.titles == [TITLES[0], "Budget", *TITLES[1:]]
    text = " ".join(page.text)
    for said in ("0.00750", "0.01250", "0.7500", "1.00 MB", "the planned one was written",
                 "planned, measured", "bits of a quantized weight on average"):  # fmt: skip
        assert said in text, said
    del told["budget"]["curve"]
    (folder / "qmoe_report.json").write_text(json.dumps(told))
    assert "planned, measured" not in report(folder).html


def test_two_folders_side_by_side(measured, other):
    html = report(measured, other).html
    page = check_alone(html)
    text = " ".join(page.text)
    assert "Both were quantized from the same weights" in text
    for said in ("experts.bits", "Settings that differ", "There are no scores of q2",
                 "Provenance: q4", "Provenance: q2"):  # fmt: skip
        assert said in text, said


def test_rounding_to_nearest_has_neither_errors_nor_coverage(other):
    text = " ".join(check_alone(report(other).html).text)
    assert "Rounding to nearest measures no errors." in text
    assert "No calibration text ran through this model." in text


@pytest.mark.slow
def test_before_and_after_tuning(short, tmp_path):
    config = qmoe.QuantConfig(search_grid=False, refit=False, tune=2, calibration=LITTLE_TEXT)
    qmoe.quantize(short, tmp_path / "tuned", config, progress=False)
    html = report(tmp_path / "tuned").html
    check_alone(html)
    assert "before tuning" in html and "after tuning" in html and "solved" in html


def test_facts_are_those_of_the_folder(measured):
    facts = gather(measured)
    names, widths = facts.widths()
    assert widths.shape == (2, 16) and (widths == 4).all()
    assert facts.grid("tokens").shape == (2, 16) and (facts.grid("errors") > 0).all()
    assert 4 < facts.bits < 8.5
    stored = sum(shard.packed + sum(shard.unpacked.values()) for shard in facts.shards)
    shapes = sum(16 * 48 + 4 for shard in facts.shards[:-1]) * 16  # weight_shape: two int64
    assert abs(stored + shapes - sum(facts.report["bytes"].values())) <= shapes
    assert set(facts.used()) == {"austen", "german"}


def test_layers_are_named_by_their_numbers():
    assert short(["model.layers.10.mlp.experts", "a.2.x"]) == ["10", "2"]
    assert short(["l.3.attention.experts", "l.3.mlp.moe"]) == ["3 experts", "3 moe"]


def test_markup_in_names_is_text(measured, tmp_path):
    folder = tmp_path / "<b>&amp;\"x'"
    shutil.copytree(measured, folder)
    html = report(folder).html
    check_alone(html)
    assert "<b>" not in html and "&lt;b&gt;" in html


def test_missing_experts_leave_cells_empty():
    values = np.array([[1.0, np.nan], [np.nan, np.nan]])
    assert "<svg" in heat_map(values, ["0", "1"], "a plot", "tokens")


def luminance(colour):
    """Relative luminance, https://www.w3.org/TR/WCAG21/#dfn-relative-luminance."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_enough_in_light_in_dark_and_on_paper():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    style = (HERE / "page.css").read_text()
    palettes = [dict(re.findall(r"--([\w-]+): (#\w{6});", block))
                for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]  # fmt: skip
    assert len(palettes) == 3
    for colours in palettes:
        for ground in ("page", "panel"):
            for text in ("ink", "quiet", "link"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
            for i in range(1, len(LINES) + 1):
                assert contrast(colours[f"line-{i}"], colours[ground]) >= 3, i


def test_the_command_writes_a_file_and_a_notebook_shows_a_frame(measured, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(measured), "--output", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    made = qmoe.report(measured)
    assert out.read_text(encoding="utf-8") == made.html
    frame = made._repr_html_()
    assert frame.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;') and "<script" not in frame


def test_refusals(short, measured, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="it is not quantized"):
        report(short)
    bare = tmp_path / "bare"
    shutil.copytree(measured, bare)
    (bare / "qmoe_report.json").unlink()
    with pytest.raises(CheckpointError, match="it has no qmoe_report.json"):
        report(bare)
    shutil.copyfile(measured / "qmoe_report.json", bare / "qmoe_report.json")
    damaged = json.loads((bare / "qmoe_report.json").read_text()) | {"bytes": [1]}
    (bare / "qmoe_report.json").write_text(json.dumps(damaged))
    with pytest.raises(CheckpointError, match="damaged"):
        report(bare)
    with pytest.raises(OutputError, match="cannot be written"):
        report(measured).save(tmp_path / "no" / "such" / "folder.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'qmoe\[report\]'"):
        report(measured)


@pytest.mark.skipif(
    not any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
    reason="there is no Chromium on this machine",
)
def test_in_a_browser(measured, tmp_path, monkeypatch):
    """No error in the console, and no scrolling to the side on a telephone."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import report_screenshots

    page = report(measured).html
    for width in (report_screenshots.PHONE, 1280):
        wide, _, console = report_screenshots.sizes(page, width)
        assert wide <= width and not console
    assert isinstance(tmp_path, Path)
