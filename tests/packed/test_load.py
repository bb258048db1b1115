"""What quantize writes can be loaded, or quantize says before the work that it could not."""

import shutil

import pytest
from helpers import ONE_DOMAIN

import qmoe
from qmoe import QuantConfig
from qmoe.cli.main import main
from qmoe.errors import CheckpointError

RTN = QuantConfig("rtn")


@pytest.fixture
def model(short, tmp_path):
    return shutil.copytree(short, tmp_path / "model")


def without_tokenizer(model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


def test_a_model_without_tokenizer(tmp_path, model, capsys, bench_in_forks):
    without_tokenizer(model)
    assert main(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn"]) == 0
    assert "no tokenizer: the source has none" in capsys.readouterr().out
    loaded, tokenizer = qmoe.load(tmp_path / "out", progress=False)
    assert tokenizer is None and loaded.can_generate()
    command = ["bench", str(tmp_path / "out"), "--prompt", "8", "--tokens", "2", "--repeats", "1"]
    assert main(command) == 0
    assert main(["eval", str(tmp_path / "out")]) == 1
    assert "no tokenizer files" in capsys.readouterr().err


def test_a_model_without_tokenizer_from_saved_statistics(tmp_path, short, model):
    text = qmoe.CalibrationConfig(ONE_DOMAIN, samples=1, seqlen=64, self_samples=0)
    few = QuantConfig(search_grid=False, calibration=text)
    saved = tmp_path / "s"
    qmoe.quantize(short, tmp_path / "first", few, save_statistics=saved, progress=False)
    without_tokenizer(model)
    qmoe.quantize(model, tmp_path / "out", few, statistics_from=[saved], progress=False)
    assert qmoe.load(tmp_path / "out", progress=False)[1] is None


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("tokenizer.json", "{", "cannot load its tokenizer"),
        ("tokenizer.json", None, "cannot load its tokenizer"),
        ("tokenizer_config.json", "[]", "expected a JSON object"),
        ("generation_config.json", "{", "bad generation_config.json"),
        ("generation_config.json", '{"max_new_tokens": -1}', "bad generation_config.json"),
    ],
)  # fmt: skip
def test_what_would_not_load_is_refused_beforehand(tmp_path, model, name, content, said):
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        qmoe.quantize(model, tmp_path / "out", RTN, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
