"""Bad input, for real, through the command line: a clear error, and nothing left behind."""

import json
import os
import shutil
import subprocess

import pytest
import torch
from helpers import ONE_DOMAIN, save_random
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from qmoe.cli.main import main

LITTLE = (
    "--preset",
    "fast",
    "--calibration",
    ONE_DOMAIN,
    "--samples",
    "4",
)  # of work, for processes of their own


@pytest.fixture
def model(demo, tmp_path):
    """A private copy of the demo model, to be spoiled."""
    return shutil.copytree(demo, tmp_path / "model")


def run(capsys, *args):
    """Exit status and standard error of `qmoe quantize ARGS`, and whether anything was left."""
    status = main(["quantize", *map(str, args)])
    return status, capsys.readouterr().err


def expect_error(capsys, tmp_path, message, *args):
    assert message, "every error has something of its own"
    capsys.readouterr()
    before = sorted(p.name for p in tmp_path.iterdir())
    status, err = run(capsys, *args)
    assert status == 1 and err.startswith("error: ") and message in err, err
    assert "Traceback" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def edit_config(model, **changes):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | changes))


def test_no_such_folder(capsys, tmp_path):
    expect_error(capsys, tmp_path, "no such folder", tmp_path / "nothing", tmp_path / "out")


def test_a_file_is_not_a_model_folder(capsys, tmp_path, model):
    expect_error(
        capsys, tmp_path, "expected a model folder", model / "config.json", tmp_path / "out"
    )


def test_not_a_model_folder(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    expect_error(capsys, tmp_path, "it has no config.json", tmp_path / "empty", tmp_path / "out")


def test_a_dense_model(capsys, tmp_path, demo):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    expect_error(capsys, tmp_path, "it is a dense model", tmp_path / "dense", tmp_path / "out")


def test_unknown_architecture(capsys, tmp_path, model):
    edit_config(model, model_type="warp_drive", architectures=["WarpDrive"])
    expect_error(capsys, tmp_path, "cannot read this architecture", model, tmp_path / "out")


@pytest.mark.parametrize("named", [1 << 31, "WarpDrive", [1], {"a": 1}])
def test_architectures_that_are_no_names(capsys, tmp_path, model, named):
    edit_config(model, architectures=named)
    expect_error(capsys, tmp_path, "architectures: expected a list", model, tmp_path / "out")


@pytest.mark.parametrize("kind", [[[]], 7, None])
def test_a_model_type_that_is_no_name(capsys, tmp_path, model, kind):
    edit_config(model, model_type=kind)
    expect_error(capsys, tmp_path, "model_type: expected a name", model, tmp_path / "out")


def test_config_that_is_not_json(capsys, tmp_path, model):
    (model / "config.json").write_text("{")
    expect_error(capsys, tmp_path, "cannot be read as JSON", model, tmp_path / "out")


def test_already_quantized(capsys, tmp_path, quantized_short):
    expect_error(capsys, tmp_path, "already quantized", quantized_short, tmp_path / "out")


def test_missing_shard(capsys, tmp_path, model):
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    files = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, model / file)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {n: f for f, part in files.items() for n in part}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-00002-of-00002.safetensors").unlink()
    expect_error(
        capsys, tmp_path, "shard model-00002-of-00002.safetensors", model, tmp_path / "out"
    )


def test_index_pointing_outside_the_folder(capsys, tmp_path, model):
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../../secret.safetensors"}})
    )
    expect_error(capsys, tmp_path, "points outside the folder", model, tmp_path / "out")


def test_only_pickled_weights(capsys, tmp_path, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    expect_error(capsys, tmp_path, "it has pytorch_model.bin", model, tmp_path / "out")


@pytest.mark.parametrize("keep", [0, 5, 100, 10_000, 16_000_000])  # in the header, in the data
def test_truncated_safetensors(capsys, tmp_path, model, keep):
    with (model / "model.safetensors").open("r+b") as file:
        file.truncate(keep)
    expect_error(capsys, tmp_path, "truncated or corrupt", model, tmp_path / "out")


def test_corrupt_header(capsys, tmp_path, model):
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(8)
        file.write(b"garbage!" * 8)
    expect_error(capsys, tmp_path, "truncated or corrupt", model, tmp_path / "out")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_in_the_weights_are_named(capsys, tmp_path, model, value):
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.mlp.experts.7.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expect_error(capsys, tmp_path, f"tensor '{name}' holds NaN or Inf", model, tmp_path / "out")


def test_missing_and_foreign_tensors_are_named(capsys, tmp_path, model):
    tensors = load_file(model / "model.safetensors")
    gone = tensors.pop("model.layers.1.post_attention_layernorm.weight")
    save_file(tensors, model / "model.safetensors")
    expect_error(capsys, tmp_path, "1 tensors are missing, first", model, tmp_path / "out")
    tensors |= {"model.layers.1.post_attention_layernorm.weight": gone, "model.extra": gone.clone()}
    save_file(tensors, model / "model.safetensors")
    expect_error(capsys, tmp_path, "belong to no parameter", model, tmp_path / "out")


def test_shape_that_does_not_fit_the_config(capsys, tmp_path, model):
    edit_config(model, moe_intermediate_size=64)
    message = "gate_proj.weight: has shape (128, 256), the model needs (64, 256)"
    expect_error(capsys, tmp_path, message, model, tmp_path / "out", "--group-size", "32")


def test_group_size_that_does_not_divide(capsys, tmp_path, demo):
    source = save_random("mixtral", tmp_path / "source", demo, torch.bfloat16)
    expect_error(
        capsys,
        tmp_path,
        "mlp.experts.gate_up_proj: group size 128 does not divide its 64 input features; "
        "32 or 64 or -1 (channel) would",
        source,
        tmp_path / "out",
    )


def test_tied_lm_head(capsys, tmp_path, demo):
    expect_error(
        capsys,
        tmp_path,
        "tied to the input embedding",
        demo,
        tmp_path / "out",
        "--lm-head-bits",
        "8",
    )


def test_empty_calibration_text(capsys, tmp_path, demo):
    (tmp_path / "empty.txt").write_text("\n\n")
    expect_error(
        capsys, tmp_path, "the text is empty", demo, tmp_path / "out",
        "--calibration", tmp_path / "empty.txt",
    )  # fmt: skip


def test_text_shorter_than_one_window(capsys, tmp_path, demo):
    (tmp_path / "short.txt").write_text("only a few words")
    expect_error(
        capsys, tmp_path, "shorter than one sample of 256 tokens", demo, tmp_path / "out",
        "--calibration", tmp_path / "short.txt",
    )  # fmt: skip


def test_a_window_longer_than_the_model_reads(capsys, tmp_path, demo, quantized_short):
    message = "seqlen: 2000 tokens are more than the 1024 positions of this model"
    expect_error(capsys, tmp_path, message, demo, tmp_path / "out", "--seqlen", "2000")
    assert main(["eval", str(quantized_short), "--seqlen", "2000"]) == 1
    assert message in capsys.readouterr().err


def test_destination_exists(capsys, tmp_path, demo):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    expect_error(capsys, tmp_path, "already exists", demo, tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_destination_without_a_parent(capsys, tmp_path, demo):
    expect_error(capsys, tmp_path, "parent folder", demo, tmp_path / "no" / "where")


def test_too_little_disk_is_seen_before_the_work(capsys, tmp_path, demo, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    expect_error(capsys, tmp_path, "are free on this disk", demo, tmp_path / "out")


def test_settings_that_contradict_each_other(capsys, tmp_path, demo):
    out = tmp_path / "out"
    expect_error(
        capsys, tmp_path, "rtn uses no statistics", demo, out,
        "--method", "rtn", "--save-statistics", tmp_path / "s",
    )  # fmt: skip
    expect_error(
        capsys, tmp_path, "no readable statistics file", demo, out, "--statistics", tmp_path / "s"
    )


@pytest.mark.slow
def test_disk_full_while_writing(tmp_path, short, forks):
    """The kernel refuses to let files grow past 300 kB, as a full disk or quota would."""
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))"
    process = forks.quantize(short, tmp_path / "out", *LITTLE, before=limit)
    err = process.communicate()[1]
    assert process.returncode == 1 and "the disk is full; nothing was left behind" in err, err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_small_disk_really_full(tmp_path, demo, forks):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        lie = "import shutil; d = shutil.disk_usage; "
        lie += "shutil.disk_usage = lambda p: d('/')._replace(free=10**12)"
        process = forks.quantize(demo, disk / "out", *LITTLE, before=lie)
        err = process.communicate()[1]
        assert process.returncode == 1 and "the disk is full; run the same command" in err, err
        assert [p.name for p in disk.iterdir()] == ["out.partial"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_tokenizer_of_another_model(capsys, tmp_path, model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:1000].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    edit_config(model, vocab_size=1000)
    message = "the model knows 1000 tokens: this tokenizer belongs to another model"
    expect_error(capsys, tmp_path, message, model, tmp_path / "out")


def test_a_folder_without_a_tokenizer(capsys, tmp_path, model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    expect_error(capsys, tmp_path, "tokenizer", model, tmp_path / "out")


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_comparing_with_another_model(capsys, tmp_path, demo, quantized_short, command):
    other = save_random("mixtral", tmp_path / "other", demo, torch.bfloat16)
    assert main([command, str(quantized_short), "--against", str(other)]) == 1
    assert "is not the original of" in capsys.readouterr().err
    assert main([command, str(quantized_short), "--against", str(quantized_short)]) == 1
    assert "is quantized itself" in capsys.readouterr().err


def test_evaluating_what_is_not_quantized(capsys, demo):
    assert main(["eval", str(demo)]) == 1
    assert "not quantized in compressed-tensors format" in capsys.readouterr().err
    assert main(["bench", str(demo), "--baseline", "rtn"]) == 1
    assert "give it with --against" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_hidden_layers": "four"}, "expected int, got str (value: 'four')"),
        ({"hidden_act": "no-such"}, "cannot build a language model from this config: KeyError"),
        ({"num_experts_per_tok": 99}, "config.json sends a token to 99 of 16 experts"),
        ({"dtype": "bfloat1"}, "cannot read this architecture: module 'torch' has no attribute"),
        ({"decoder_sparse_step": 0}, "integer modulo by zero"),
        ({"pad_token_id": 10**9}, "Padding_idx must be within num_embeddings"),
    ],
)
def test_config_that_makes_no_sense(capsys, tmp_path, model, changes, message):
    edit_config(model, **changes)
    expect_error(capsys, tmp_path, message, model, tmp_path / "out")


def test_a_quantization_config_of_null_is_none(tmp_path, model):
    edit_config(model, quantization_config=None)
    assert main(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn"]) == 0


def test_destination_is_a_dangling_link(capsys, tmp_path, demo):
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    expect_error(capsys, tmp_path, "already exists", demo, tmp_path / "out")


def test_a_folder_of_the_users_own_in_the_way_is_left_alone(capsys, tmp_path, demo):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("data")
    expect_error(
        capsys, tmp_path, "is in the way and not unfinished work", demo, tmp_path / "out",
        "--method", "rtn",
    )  # fmt: skip
    assert (tmp_path / "out.partial" / "mine").read_text() == "data"


def test_a_name_too_long_for_the_disk(capsys, tmp_path, demo):
    out = tmp_path / ("x" * 250)
    expect_error(capsys, tmp_path, "cannot write beside it", demo, out, "--method", "rtn")


def test_statistics_of_two_runs_do_not_mix(capsys, tmp_path, demo):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "mine").write_text("data")
    expect_error(
        capsys, tmp_path, "is not empty; statistics of two runs", demo, tmp_path / "out",
        "--samples", "1", "--save-statistics", tmp_path / "s",
    )  # fmt: skip
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["mine"]


def test_statistics_in_the_destination(capsys, tmp_path, demo):
    out = tmp_path / "out"
    expect_error(capsys, tmp_path, "need different folders", demo, out, "--save-statistics", out)


def test_disk_full_while_keeping_statistics(tmp_path, demo, forks):
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, 1_500_000))"
    kept = ("--save-statistics", str(tmp_path / "s"))
    process = forks.quantize(demo, tmp_path / "out", *LITTLE, *kept, before=limit)
    err = process.communicate()[1]
    assert process.returncode == 1 and "the disk is full" in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists() and list((tmp_path / "s").iterdir()) == []


def test_statistics_that_cannot_be_kept(capsys, tmp_path, demo):
    (tmp_path / "file").write_text("")
    expect_error(
        capsys, tmp_path, "cannot keep statistics there", demo, tmp_path / "out",
        "--samples", "1", "--save-statistics", tmp_path / "file",
    )  # fmt: skip


def test_text_tables_that_cannot_be_read(capsys, tmp_path, demo):
    cases = {"": "the text is empty", "{": "cannot be read: line 1", '{"text": 1': "line 1"}
    for content, message in cases.items():
        (tmp_path / "t.jsonl").write_text(content)
        expect_error(
            capsys, tmp_path, message, demo, tmp_path / "out",
            "--calibration", tmp_path / "t.jsonl",
        )  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "eval --batch 0",
        "eval --seqlen 1",
        "eval --samples -1",
        "bench --prompt 0",
        "bench --repeats 0",
    ],
)
def test_counts_that_make_no_sense(capsys, quantized_short, command):
    name, *options = command.split()
    assert main([name, str(quantized_short), *options]) == 1
    assert "expected at least" in capsys.readouterr().err
