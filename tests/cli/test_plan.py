"""`qmoe plan` as a person and as a program reads it."""

import json

import pytest

from qmoe.cli.main import main
from qmoe.cli.options import build_parser
from qmoe.cli.settings import config_from
from qmoe.config import Scheme
from qmoe.plan.run_plan import RunPlan
from qmoe.system import host_memory


def run(capsys, *args):
    status = main(["plan", *map(str, args)])
    out = capsys.readouterr()
    return status, out.out, out.err


def planned(capsys, *args):
    status, out, err = run(capsys, *args, "--json")
    assert status == 0, err
    return json.loads(out)


def test_on_the_cpu(demo, capsys):
    found = planned(capsys, demo, "--context", 512, "--ram", "2GB")
    assert found["scheme"] == vars(Scheme(8))
    assert found["bytes"]["gpu"] == 0 and found["bytes"]["host"] <= found["ram"] == 2 * 10**9
    assert found["bytes"]["host"] == sum(part["host"] for part in found["parts"])
    assert found["commands"][0] == f"qmoe quantize {demo} DST --bits 8 --group-size 128"
    assert found["commands"][1] == "qmoe bench DST"


def test_the_least_memory_is_what_is_free(demo, capsys, monkeypatch):
    room = host_memory.Room(490_000_000, "under the limit of group /a")
    monkeypatch.setattr("qmoe.cli.plan.room", lambda: room)
    status, out, _ = run(capsys, demo, "--context", 512)
    assert status == 0 and "490.00 MB are free under the limit of group /a" in out
    assert "--bits 4" in out  # 8 bits take 492 MB
    monkeypatch.setattr("qmoe.cli.plan.room", lambda: host_memory.Room(9, room.reason))
    status, out, err = run(capsys, demo, "--context", 512)
    assert status == 1 and not out
    assert "more than the 9 that are free under the limit of group /a; most of it is" in err


def test_experts_beside_a_gpu(demo, capsys, tmp_path):
    options = ["--context", 256, "--ram", "8GB", "--vram", "857MB"]
    found = planned(capsys, demo, *options, "--bits", 8)
    assert 0 < found["experts_on_gpu"] < 1 and found["read_per_step"]["host"] > 0
    assert found["hybrid"] and found["slots"] is None
    assert found["commands"][1] == "qmoe bench DST --device cuda --plan FILE"
    file = tmp_path / "plan.json"
    status, out, _ = run(capsys, demo, *options, "--save", file)
    assert status == 0 and "experts on the GPU" in out and f"--plan {file}" in out
    plan = RunPlan.read(file)
    assert plan.hybrid and plan.vram == 857_000_000 and plan.ram == 8 * 10**9
    assert 0 < plan.expert_memory < plan.gpu < plan.vram and plan.kv == "bf16"


def test_a_cache_in_8_bits(demo, capsys):
    plain, small = (
        planned(capsys, demo, "--context", 512, "--ram", "8GB", "--bits", 4, "--kv", kv)
        for kv in ("bf16", "int8")
    )
    (before,), (after,) = (
        [p["host"] for p in found["parts"] if p["name"].startswith("cache")]
        for found in (plain, small)
    )
    assert before / 2 < after < 0.6 * before
    assert small["commands"][1] == "qmoe bench DST --kv int8"


def test_nothing_fits(demo, capsys):
    status, out, err = run(capsys, demo, "--vram", "20MB", "--ram", "1GB", "--context", 64)
    assert status == 1 and out == ""
    assert err.startswith("error: plan: no scheme fits") and "bytes of GPU memory" in err


@pytest.mark.parametrize(
    "options",
    [
        ["--asymmetric", "--dense-bits", "4"],
        ["--set", "dense.group_size=64", "--lm-head-bits", "16"],
        ["--bits", "3", "--group-size", "64"],
    ],
)
def test_the_command_gives_the_settings_of_the_plan(demo, capsys, options, tmp_path):
    found = planned(capsys, demo, "--context", 64, *options)
    command = found["commands"][0].split()[1:]
    args = build_parser().parse_args(command)
    assert args.command == "quantize" and args.src == str(demo)
    config = config_from(args)
    assert vars(config.experts) == found["scheme"]
    wanted = config_from(build_parser().parse_args(["quantize", "a", "b", *options]))
    assert (config.dense, config.lm_head) == (wanted.dense, wanted.lm_head)
    assert config.experts.symmetric == wanted.experts.symmetric


def test_bits_of_a_config_file_are_given(demo, capsys, tmp_path):
    (tmp_path / "c.toml").write_text("[experts]\nbits = 2\n[dense]\nbits = 16\n")
    found = planned(capsys, demo, "--context", 64, "--config", tmp_path / "c.toml")
    assert {c["experts"].split()[0] for c in found["candidates"]} == {"2"}
    assert not any(part["name"] == "dense linears" for part in found["parts"])


def test_a_folder_that_is_quantized(quantized_short, capsys):
    status, _, err = run(capsys, quantized_short)
    assert status == 1 and "already quantized" in err


@pytest.mark.parametrize(
    "options, said",
    [
        (["--vram", "12"], "--vram: 12 has no unit"),
        (["--ram", "much"], "--ram: expected a size"),
        (["--context", "2000"], "more than the 1024 positions"),
        (["--batch", "0"], "batch: expected 1 or more"),
        (["--set", "experts.bit=3"], "unknown key"),
        (["--dense-bits", "4", "--set", "dense.group_size=128", "--bits", "5"], ""),
    ],
)
def test_bad_options(demo, capsys, options, said):
    try:
        status, _, err = run(capsys, demo, *options)
    except SystemExit as error:  # argparse
        assert error.code == 2 and said == ""
        return
    assert status == 1 and said in err
