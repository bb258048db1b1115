"""Arguments of the wrong kind, options that contradict each other, and how a process ends."""

import os
import signal
import stat
import time

import pytest
from helpers import ONE_DOMAIN

import qmoe
from qmoe import QuantConfig
from qmoe.cli.main import main
from qmoe.cli.options import build_parser
from qmoe.cli.settings import config_from
from qmoe.errors import ConfigError

WRONG = """
quantize(3, out)
quantize("a/b\\0", out)
quantize("x" * 5000, out)
quantize(".", 3)
quantize(".", out, {"bits": 4})
quantize(".", out, statistics_from="folder")
quantize(".", out, statistics_from=[3])
quantize(".", out, save_statistics=3)
load(None)
load(".", dtype="bfloat16")
load(".", device=[])
load(".", expert_memory="6 elephants")
load(".", expert_memory=6.5)
quantize(".", out, max_memory="12")
Scheme(bits="4")
Scheme(symmetric="no")
Scheme(group_size=[])
CalibrationConfig(samples="x")
CalibrationConfig(text=3)
CalibrationConfig(seed=0.5)
QuantConfig(damp="x")
QuantConfig(method=["gptq"])
QuantConfig(min_tokens=None)
QuantConfig.from_dict(3)
QuantConfig.from_dict({"tune": "many"})
QuantConfig.from_dict({"experts": 3})
QuantConfig.from_dict({"lm_head": 3, "dense": 4})
QuantConfig.from_dict({"calibration": 3})
QuantConfig.from_dict({"search_grid": "yes"})
QuantConfig.from_dict({"method": ["gptq"]})
"""


def test_arguments_of_the_wrong_kind(tmp_path, forks):
    """In a process of its own: the type checks of the tests are not there for a user."""
    code = f"""
from qmoe import *
from qmoe import QmoeError
out = {str(tmp_path / "out")!r}
for call in {WRONG.strip().splitlines()!r}:
    try:
        eval(call)
        print(call, "passed")
    except QmoeError as error:
        assert 20 < len(str(error)) < 500, (call, error)
    except BaseException as error:
        print(call, repr(error))
"""
    assert forks.run(code) == (0, "", "")


def test_text_options_contradict_statistics():
    parse = build_parser().parse_args
    for option, name in {
        "--samples": "samples",
        "--set=calibration.seed=9": "seed",
        "--seqlen": "seqlen",
        "--calibration": "text",
        "--set=calibration.batch=9": "batch",
    }.items():
        given = [option] if "=" in option else [option, "9"]
        args = parse(["quantize", "a", "b", *given, "--statistics", "s"])
        with pytest.raises(ConfigError, match=f"calibration.{name}: with --statistics no text is"):
            config_from(args)


@pytest.mark.parametrize("text", ["word " * 1000, "~nobody-here/x.txt"])
def test_calibration_that_is_the_text_itself(capsys, tmp_path, demo, text):
    assert main(["quantize", str(demo), str(tmp_path / "out"), "--calibration", text]) == 1
    err = capsys.readouterr().err
    assert "no such text file" in err and len(err) < 1000
    assert not list(tmp_path.iterdir())


def test_files_have_the_mode_that_the_umask_says(tmp_path, demo):
    before = os.umask(0o027)
    try:
        qmoe.quantize(demo, tmp_path / "out", QuantConfig("rtn"), progress=False)
    finally:
        os.umask(before)
    modes = {p.name: oct(stat.S_IMODE(p.stat().st_mode)) for p in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {"0o640"}, modes


def test_a_closed_terminal_is_like_an_interrupt(tmp_path, demo, forks):
    process = forks.quantize(
        demo, tmp_path / "out", "--preset", "fast", "--calibration", ONE_DOMAIN, "--samples", "24"
    )
    while not (tmp_path / "out.partial").exists():  # all layers are still to come: time enough
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGHUP)
    err = process.communicate()[1]
    assert process.returncode == 130 and "the same command goes on" in err, err


def test_completion_scripts_know_every_command(capsys):
    with pytest.raises(SystemExit) as ended:
        build_parser().parse_args(["--completion", "bash"])
    script = capsys.readouterr().out
    assert ended.value.code == 0
    for command in ("quantize", "plan", "inspect", "eval", "bench", "families", "info"):
        assert f"_shtab_qmoe_{command}_option_strings" in script
    assert "--preset" in script and "--windows" not in script
