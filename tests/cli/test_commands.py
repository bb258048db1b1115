"""Every command from its arguments to what it prints."""

import json

import pytest

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli.main import main
from qmoe.measure.bench import memory


def test_json_output_of_every_command(short, quantized_short, tmp_path, capsys):
    def run(*args):
        assert main([*map(str, args), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    report = run("quantize", short, tmp_path / "q", "--method", "rtn")
    assert report["bytes"]["experts packed"] > 0
    assert run("inspect", quantized_short)["bytes"] == report["bytes"]
    assert len(run("inspect", quantized_short, "--experts")["experts"]) == 32
    parts = run("inspect", short)["parts"]
    assert {
        "name": "model.layers.0.mlp.experts",
        "shapes": [[16, 256, 256], [16, 256, 128]],
    } in parts
    scores = run("eval", quantized_short, "--samples", "1", "--text", "heldout:austen")["scores"]
    assert scores["qmoe"]["austen"]["perplexity"] > 1


@pytest.mark.slow
def test_memory_is_measured_in_a_fresh_process(quantized_short):
    found = memory("qmoe", ModelFolder(quantized_short))
    assert 0 < found["without_model"] < found["loaded"] <= found["peak"]


def test_bench_measures_every_model(short, quantized_short, bench_in_forks, capsys):
    command = ["bench", str(quantized_short), "--against", str(short), "--baseline", "rtn", "nf4"]
    assert main([*command, "--prompt", "16", "--tokens", "2", "--repeats", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert set(result) == {"qmoe", "original", "rtn", "nf4"}
    for figures in result.values():
        assert figures["prefill_tokens_per_s"] > 0 and figures["decode_tokens_per_s"] > 0
    # 4 of 16 experts and the whole dense tier are read for a token; embeddings are tied.
    assert result["qmoe"]["bytes_per_token"] < 0.7 * result["original"]["bytes_per_token"]
    expert_bytes = 2 * 16 * 3 * 256 * 128 * 2
    rest = result["original"]["weights_in_memory"] - expert_bytes
    assert result["original"]["bytes_per_token"] == rest + expert_bytes // 4


def test_people_get_tables_and_no_progress_bars_when_piped(
    short, quantized_short, bench_in_forks, tmp_path, capsys
):
    little = ["--samples", "1", "--seqlen", "64"]
    ours = ["eval", quantized_short, *little, "--text", "heldout:austen"]
    for command in (
        ["quantize", short, tmp_path / "q", "--preset", "fast", *little],
        ["inspect", quantized_short, "--experts"],
        ["inspect", short],
        [*ours, "--against", short],
        [*ours, "--against", short, "--baseline", "rtn"],
        ["bench", quantized_short, "--prompt", "8", "--tokens", "1", "--repeats", "1"],
    ):
        assert main([str(c) for c in command]) == 0
        out, err = capsys.readouterr()
        assert out.strip() and not err.strip(), err
