"""A run on less text than was asked for, or that passed over some of it, says so."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import first_layers
from transformers import AutoConfig, AutoTokenizer

import qmoe
from qmoe import CalibrationConfig, QuantConfig
from qmoe.calibration import stats
from qmoe.calibration.stats import LAYOUT
from qmoe.cli.main import main
from qmoe.errors import CalibrationError
from qmoe.pipeline import self_text
from qmoe.system.files import write_safetensors


def lines(n):
    return "".join(f"In year {i} the question was asked again, for once.\n" for i in range(n))


@pytest.fixture
def config(tmp_path):
    """Text of three domains in a folder: enough, a little, and less than a sample."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "enough.txt").write_text(lines(500))
    (folder / "little.jsonl").write_text(json.dumps({"text": lines(10)}) + '\n{"text": null}\n')
    (folder / "none.txt").write_text("few words")
    (folder / "about.pdf").write_text("")
    return QuantConfig.preset("fast", text=str(folder), samples=24, seqlen=64)


def said(lines, folder):
    """Whether these are the lines about that text, and none besides."""
    beside, empty, short = lines
    assert beside == f"{folder}: not read as text: about.pdf"
    assert empty == f"{folder / 'little.jsonl'}: 1 of 2 rows hold no text (null or empty)"
    assert short.startswith("text: 24 samples of 64 tokens were asked for, 1"), short
    assert "little 2 of 8" in short and "none 0 of 8" in short and "enough" not in short
    return True


def test_the_report_of_a_run_and_of_one_on_its_statistics(demo, tmp_path, config):
    source = first_layers(demo, tmp_path / "source", 1)
    saved = tmp_path / "s"
    report = qmoe.quantize(source, tmp_path / "a", config, save_statistics=saved, progress=False)
    assert said(report["fallbacks"][:3], tmp_path / "text")
    assert report["calibration"]["samples"] == [10, 64]
    again = qmoe.quantize(source, tmp_path / "b", config, statistics_from=[saved], progress=False)
    marked = [line for line in again["fallbacks"] if line.startswith(f"{saved}: ")]
    assert said([line.removeprefix(f"{saved}: ") for line in marked], tmp_path / "text")
    enough = replace(
        config,
        calibration=CalibrationConfig("bundled:austen", samples=4, seqlen=64, self_samples=0),
    )
    report = qmoe.quantize(source, tmp_path / "c", enough, progress=False)
    assert not [line for line in report["fallbacks"] if "text" in line]


def test_notes_in_statistics_that_are_damaged(tmp_path):
    path = tmp_path / "s.safetensors"
    write_safetensors(path, {}, {"qmoe_statistics": LAYOUT, "notes": "{"})
    with pytest.raises(CalibrationError, match="its notes are damaged"):
        stats.check(path, {})


def test_an_evaluation_says_it_too(quantized_short, tmp_path, config, capsys):
    folder = tmp_path / "text"
    args = ["eval", str(quantized_short), "--text", str(folder), "--samples", "8", "--seqlen", "64"]
    assert main(args) == 1
    assert "none); give more text or a smaller sample" in capsys.readouterr().err
    (folder / "none.txt").unlink()
    assert main([*args, "--json"]) == 0
    beside, empty, short = json.loads(capsys.readouterr().out)["fallbacks"]
    assert "about.pdf" in beside and "1 of 2 rows" in empty
    assert short.startswith("text: 16 samples of 64 tokens were asked for, 10 found: little 2 of 8")
    assert main(args) == 0
    assert "asked for, 10 found: little 2 of 8" in capsys.readouterr().out


def test_text_that_stops_early_is_not_taken_for_a_window(demo, monkeypatch):
    """Some families have ways to end a text that generate's options do not overrule."""
    monkeypatch.setattr(self_text, "_continue", lambda model, rows, length: rows[:, :1])
    model = SimpleNamespace(config=AutoConfig.from_pretrained(demo), device=torch.device("cpu"))
    tokenizer = AutoTokenizer.from_pretrained(demo)
    with pytest.raises(ValueError, match="texts end after 1 of 32 tokens"):
        self_text.write(model, tokenizer, CalibrationConfig(samples=1, self_samples=2, seqlen=64))
