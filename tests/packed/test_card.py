"""The model card of a quantized folder: its metadata, the original's card, what runs the model, the
command that makes it again, and measurements that are added."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml
from helpers import QUICK, same_files

import qmoe
from qmoe.checkpoint.folders import origin
from qmoe.cli.main import main
from qmoe.cli.options import build_parser
from qmoe.cli.settings import config_from
from qmoe.config.command import arguments
from qmoe.errors import CheckpointError
from qmoe.packed.card import BEGIN, END, metadata, read_card, refresh_card, write_card
from qmoe.packed.card_text import body, command
from qmoe.packed.measured import MEASURED, read_measured
from qmoe.packed.report import read_report

ORIGINAL = """\
---
license: mit
language: [en, de]
tags: text-generation
base_model: somebody/pretrained
model-index: [{name: x, results: []}]
---
# The original

Words of its maker: grüße.
"""
CONFIGS = [
    qmoe.QuantConfig(),
    qmoe.QuantConfig.preset("fast", text=["chats.jsonl:dialog", "bundled"]),
    qmoe.QuantConfig.preset("best", experts=qmoe.Scheme(2, 64, symmetric=False)),
    qmoe.QuantConfig(method="rtn", dense=None, lm_head=qmoe.Scheme(8, -1)),
    qmoe.QuantConfig(method="awq-gptq", damp=0.02, act_order=False),
    qmoe.QuantConfig(rotate="online").rotated_by(64),
]


def report_of(config=CONFIGS[0], **changes):
    return {
        "qmoe_version": "0.1.0",
        "source": {"name": "org/Model-1B", "revision": "0123456789abcdef"},
        "model_type": "qwen3_moe",
        "config": config.to_dict(),
        "symmetric": config.symmetric,
        "rotated": config.rotated,
        "fallbacks": [],
        "bytes": {"experts packed": 10, "experts scales": 2, "dense packed": 5, "router": 1},
        "source_bytes": 60,
    } | changes


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method} {c.rotate}")
def test_the_command_gives_the_same_settings(config):
    words = shlex.split(command(report_of(config)))
    assert words[:4] == ["qmoe", "quantize", "org/Model-1B", f"Model-1B-int{config.experts.bits}"]
    again = config_from(build_parser().parse_args(words[1:]))
    assert again == (config.rotated_by(0) if config.rotate == "online" else config)


def test_the_nearest_preset_is_named():
    assert arguments(qmoe.QuantConfig()) == []
    assert arguments(qmoe.QuantConfig.preset("best")) == ["--preset", "best"]


def test_metadata_carries_the_license_over_and_names_the_base_model():
    data = metadata(report_of(), yaml.safe_load(ORIGINAL.split("---")[1]))
    assert data["license"] == "mit" and data["language"] == ["en", "de"]
    assert data["base_model"] == "org/Model-1B" and data["base_model_relation"] == "quantized"
    assert data["tags"][0] == "text-generation" and {"qmoe", "moe", "4-bit"} <= set(data["tags"])
    assert "model-index" not in data  # the original's scores are not this model's


def test_a_local_original_is_no_base_model_of_the_hub():
    report = report_of(source={"name": "my-model"})
    assert not {"base_model", "base_model_relation"} & set(metadata(report, {}))
    assert "names no `base_model`" in body(report, {}, {})


def test_the_original_of_a_folder(tmp_path):
    cached = Path("hub/models--org--Model-1B/snapshots/0123")
    assert origin(cached) == {"name": "org/Model-1B", "revision": "0123"}
    assert origin(tmp_path / "some" / ".." / "model") == {"name": "model"}


def test_the_card_of_the_original_stays_below(tmp_path):
    (tmp_path / "README.md").write_text(ORIGINAL, encoding="utf-8")
    data, text, unread = read_card(tmp_path)
    write_card(tmp_path, report_of(), data, text)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    head, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head)["license"] == "mit" and not unread
    assert rest.index(BEGIN) < rest.index(END) < rest.index("Words of its maker: grüße.")
    assert "The license of the original applies: mit." in rest


@pytest.mark.parametrize(
    "head, said",
    [("license: [mit", "not YAML"), ("- a list", "expected keys"), ("!!python/x y", "not YAML"),
     ("a: &x [*x]", "not YAML"), ("d: 2001-99-99", "not YAML"), ("? [1]\n: 2", "not YAML")],
)  # fmt: skip
def test_metadata_that_cannot_be_read_is_left_out_and_said(head, said, tmp_path):
    (tmp_path / "README.md").write_bytes(f"---\n{head}\n---\nText.\n".encode() + b"\xff\n")
    data, text, unread = read_card(tmp_path)
    assert data == {} and said in unread[0]
    write_card(tmp_path, report_of(), data, text)
    assert (tmp_path / "README.md").read_bytes().rstrip().endswith(b"Text.\n\xff")


def test_only_engines_that_can_run_the_model_are_offered():
    plain = body(report_of(), {}, {})
    assert "vllm serve Model-1B-int4" in plain and "from_pretrained" in plain
    for config, what in ((CONFIGS[2], "zero points"), (CONFIGS[5], "rotated at run time")):
        card = body(report_of(config), {}, {})
        assert "vllm serve" not in card and what in card
        assert "qmoe.load(" in card


def test_a_run_writes_the_card_and_eval_and_bench_add_to_it(
    short, quantized_short, bench_in_forks, tmp_path, capsys
):
    folder = tmp_path / "q"
    shutil.copytree(quantized_short, folder)
    card = (folder / "README.md").read_text()
    assert "No comparison with the original is recorded" in card
    evaluate = ["eval", str(folder), "--against", str(short), "--samples", "1", "--save"]
    assert main([*evaluate, "--text", "heldout:austen", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    layers = set(result["routing_kept"])
    assert layers == {f"model.layers.{i}.mlp.experts" for i in range(2)}
    assert all(0.5 < share <= 1 for share in result["routing_kept"].values())
    assert all(sum(counts) == 256 * 4 for counts in result["experts_used"]["austen"].values())
    bench = ["bench", str(folder), "--against", str(short), "--prompt", "8", "--tokens", "1"]
    assert main([*bench, "--repeats", "1", "--save"]) == 0
    card = (folder / "README.md").read_text()
    kl = result["overall"]["qmoe"]["kl"]
    assert f"{kl:.5f}" in card and "## Speed" in card and "No comparison" not in card
    measured = read_measured(folder)
    assert set(measured) == {"eval", "bench"}
    planned, found = measured["bench"]["planned"], measured["bench"]["models"]["qmoe"]
    assert planned["weights"] == pytest.approx(found["weights_in_memory"], rel=0.02)
    assert main(["inspect", str(folder)]) == 0  # the audit is not disturbed by what was added


def test_a_card_that_was_rewritten_by_hand_is_left_alone(tmp_path):
    (tmp_path / "README.md").write_text("My own words.\n")
    assert not refresh_card(tmp_path, report_of(), {})
    assert (tmp_path / "README.md").read_text() == "My own words.\n"


def test_nothing_is_saved_beside_a_folder_without_a_report(short, tmp_path, capsys):
    assert main(["eval", str(short), "--save"]) == 1
    assert "has no qmoe_report.json" in capsys.readouterr().err
    assert main(["bench", "org/on-the-hub", "--save"]) == 1
    assert "expected a local folder" in capsys.readouterr().err
    assert not (short / MEASURED).exists()


@pytest.mark.parametrize("found", [{"eval": []}, {"eval": {}}, {"bench": {"models": 3}}])
def test_damaged_measurements_are_refused(found, tmp_path):
    (tmp_path / MEASURED).write_text(json.dumps(found))
    with pytest.raises(CheckpointError, match="damaged"):
        read_measured(tmp_path)


@pytest.mark.slow
def test_equal_runs_write_equal_cards(short, quantized_short, tmp_path):
    shutil.copytree(short, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text(ORIGINAL, encoding="utf-8")
    for name in ("a", "b"):
        qmoe.quantize(tmp_path / "source", tmp_path / name, QUICK, progress=False)
    assert same_files(tmp_path / "a", tmp_path / "b")
    assert read_report(tmp_path / "a")["source"] == {"name": "source"}
    assert "Words of its maker" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
