"""What `quantize`'s options, its config file and `--set` make of the settings."""

import re

import pytest

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.cli.main import main
from qmoe.cli.options import build_parser
from qmoe.cli.renamed import RENAMED
from qmoe.cli.settings import config_from, to_toml
from qmoe.config import setting_names
from qmoe.errors import ConfigError


def config(*options):
    return config_from(build_parser().parse_args(["quantize", "a", "b", *options]))


class Reached(Exception):
    """A run came as far as its settings."""


@pytest.mark.parametrize("command", [[], ["--preset", "balanced"]])
def test_the_command_and_the_library_have_one_default(monkeypatch, demo, tmp_path, command):
    seen = []

    def stop(src, dst, settings, **more):
        seen.append(settings)
        raise Reached

    monkeypatch.setattr("qmoe.pipeline.quantize.check", stop)
    with pytest.raises(Reached):
        main(["quantize", str(demo), str(tmp_path / "out"), *command])
    for given in ([], [QuantConfig()], [QuantConfig.preset("balanced")]):
        with pytest.raises(Reached):
            qmoe.quantize(demo, tmp_path / "out", *given)
    assert len(set(seen)) == 1 and len(seen) == 4


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "awq-gptq"])
def test_a_method_means_the_same_on_both_sides(method):
    assert config("--method", method) == QuantConfig(method)
    assert config("--preset", "fast", "--method", method) == QuantConfig.preset(
        "fast", method=method
    )


@pytest.mark.parametrize("preset", ["balanced", "best"])
@pytest.mark.parametrize("method", ["rtn", "awq"])
def test_a_preset_that_contradicts_the_method(preset, method):
    said = f"preset: {preset} is made of steps of GPTQ, the method is {method}; leave the preset"
    for options in (["--method", method], ["--set", f"method={method}"]):
        with pytest.raises(ConfigError, match=said):
            config("--preset", preset, *options)
    with pytest.raises(ConfigError, match=said):
        QuantConfig.preset(preset, method=method)


def test_a_step_that_the_method_does_not_have():
    with pytest.raises(ConfigError, match="refit: is a step of the method gptq, the method is awq"):
        config("--method", "awq-gptq", "--set", "refit=true")
    with pytest.raises(ConfigError, match="search_grid: is a step of the method gptq or awq-gptq"):
        QuantConfig("rtn", search_grid=True)


def test_options_become_the_config():
    command = """
        --method awq --bits 3 --group-size 64 --asymmetric --dense-bits 4 --lm-head-bits 8
        --set dense.group_size=32 --set dense.symmetric=false --set damp=0.1 --set min_tokens=7
        --calibration x.txt --samples 3 --self-samples 1 --seqlen 5 --set calibration.seed=9
    """
    found = config(*command.split())
    assert found == QuantConfig(
        method="awq",
        experts=Scheme(3, 64, False),
        dense=Scheme(4, 32, False),
        lm_head=Scheme(8, 32, False),  # what its table leaves out is as in dense
        damp=0.1,
        min_tokens=7,
        calibration=qmoe.CalibrationConfig("x.txt", 3, 5, seed=9, self_samples=1),
    )
    assert config("--dense-bits", "16").dense is None
    assert config("--set", "dense.bits=16").dense is None
    with pytest.raises(ConfigError, match="lm_head: it stays in 16 bits unless lm_head.bits says"):
        config("--set", "lm_head.group_size=64")


def test_later_ones_win(tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text('tune = 3\ndamp = 0.5\n[experts]\nbits = 2\n[calibration]\ntext = ["a", "b"]\n')
    assert config("--preset", "best").tune == 200
    given = ["--preset", "best", "--config", str(file)]
    assert config(*given).tune == 3 and config(*given).calibration.samples == 128
    assert config(*given).calibration.text == ("a", "b")
    assert config(*given, "--tune", "4").tune == 4
    assert config(*given, "--tune", "4", "--set", "tune=5", "--set", "tune=6").tune == 6
    assert config(*given, "--bits", "8").experts == Scheme(8)
    assert config(*given, "--set", "experts.symmetric=false").experts == Scheme(2, 128, False)


def test_target():
    """It changes the preset, and what is said otherwise wins."""
    made = config("--target", "llama.cpp")
    schemes = dict(experts=Scheme(4, 32, gguf=True), dense=Scheme(8, 32, gguf=True))
    assert made == QuantConfig(**schemes, target="llama.cpp")
    assert config("--target", "llama.cpp", "--preset", "best").tune == 200
    made = config("--target", "llama.cpp", "--bits", "2", "--group-size", "64", "--asymmetric")
    assert made.experts == Scheme(2, 64, False, gguf=True)
    assert config("--target", "llama.cpp", "--lm-head-bits", "8").lm_head == Scheme(
        8, 32, gguf=True
    )


@pytest.mark.parametrize(
    "settings",
    [
        QuantConfig(),
        QuantConfig.preset("best", lm_head=Scheme(4, 32), dense=None, rotate="fused"),
        QuantConfig("awq", calibration=qmoe.CalibrationConfig(['a "b".txt', "ü\x7f\n\\"])),
    ],
)
def test_a_config_file_of_any_settings(tmp_path, settings):
    (tmp_path / "c.toml").write_text(to_toml(settings.to_dict()), encoding="utf-8")
    assert config("--config", str(tmp_path / "c.toml")) == settings


def test_the_settings_of_a_folder_are_a_config_file(quantized_short, tmp_path, capsys):
    assert main(["inspect", str(quantized_short), "--config"]) == 0
    (tmp_path / "c.toml").write_text(capsys.readouterr().out)
    made = QuantConfig.from_dict(qmoe.packed.report.read_report(quantized_short)["config"])
    assert config("--config", str(tmp_path / "c.toml")) == made


@pytest.mark.parametrize(
    "options, said",
    [
        (["--set", "damp"], "--set 'damp': expected NAME=VALUE"),
        (["--set", "=3"], "expected NAME=VALUE"),
        (["--set", "tune=1\ndamp=2"], "--set tune: expected one value"),
        (["--set", "samples=3"], "unknown key 'samples'; the nearest is 'calibration.samples'"),
        (["--set", "experts.bit=3"], "unknown key 'experts.bit'; the nearest is 'experts.bits'"),
        (["--set", "lm_head.bots=16"], "unknown key 'lm_head.bots'; the nearest is 'lm_head.bits'"),
        (["--set", "zebra=3"], "unknown key 'zebra'; known are"),
        (["--set", "calibration=3", "--statistics", "s"], "calibration: with --statistics no text"),
        (["--config", "nowhere.toml"], "nowhere.toml: the config file cannot be read: No such"),
        (["--config", "bad.toml"], "bad.toml: the config file is not TOML"),
        (["--config", "binary.toml"], "binary.toml: the config file is not TOML"),
    ],
)
def test_settings_that_are_none(monkeypatch, tmp_path, options, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("damp 3")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=re.escape(said)):
        config(*options)


@pytest.mark.parametrize("old", RENAMED["quantize"])
def test_a_former_name_works_and_says_the_new_one(capsys, old):
    now = RENAMED["quantize"][old]
    value = ["0.5" if old == "--damp" else "32"] * (now.startswith("--") or now.endswith("="))
    new = [now, *value] if now.startswith("--") else ["--set", now + "".join(value)]
    bits = ["--dense-bits", "4"]
    assert config(old, *value, *bits) == config(*new, *bits) != config(*bits) or "true" in now
    assert capsys.readouterr().err == f"{old} is now {' '.join(new)}\n"


def test_former_names_of_eval(capsys):
    args = build_parser().parse_args(["eval", "x", "--windows", "3", "--window", "64"])
    assert (args.samples, args.seqlen) == (3, 64)
    assert capsys.readouterr().err == "--windows is now --samples 3\n--window is now --seqlen 64\n"


def test_the_help_has_what_a_user_decides(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["quantize", "--help"])
    out = capsys.readouterr().out
    options = set(re.findall(r"^  (?:-h, )?(--[a-z-]+)", out, re.MULTILINE))
    assert len(options) <= 31 and not options & set(RENAMED["quantize"])
    named = set(re.findall(r"\[([a-z_.]+)[,\]]", out.replace("\n" + " " * 24, " ")))
    assert {"experts.bits", "calibration.samples", "method"} <= named <= set(setting_names())
