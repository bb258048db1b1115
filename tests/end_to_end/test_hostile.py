"""Folders made to do harm: a clear error, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT
from helpers import save_random
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import qmoe
from qmoe import QuantConfig
from qmoe.checkpoint.folders import resolve
from qmoe.cli.main import main
from qmoe.errors import CheckpointError
from qmoe.measure.families import families, save_tiny


@pytest.fixture
def model(demo, tmp_path):
    return shutil.copytree(demo, tmp_path / "model")


def expect(capsys, message, *args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and "Traceback" not in err, err


def refused(capsys, tmp_path, message, model, *options):
    """`quantize` refuses with the message and leaves nothing."""
    before = sorted(p.name for p in tmp_path.iterdir())
    expect(capsys, message, "quantize", model, tmp_path / "out", *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.slow
def test_seventy_damages(tmp_path):
    """A small piece of what scripts/fuzz/run.py does by the thousand."""
    script = str(ROOT / "scripts" / "fuzz" / "run.py")
    command = [sys.executable, "-P", "-W", "ignore", script, "--mutations", "70", "--seed", "11"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HOME": "/"})
    assert done.returncode == 0 and "70 mutations, 0 failures" in done.stdout, done.stdout


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "notes.txt"])
def test_a_link_out_of_the_folder(capsys, tmp_path, model, name):
    (tmp_path / "secret").write_text("secret")
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / "secret")
    refused(capsys, tmp_path, f"{name} is a link that leads out of the folder", model)


def test_links_of_the_hub_cache_and_inside_the_folder(tmp_path, model):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    (snapshot / "again.json").symlink_to("config.json")
    (tmp_path / "short").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "short"):
        qmoe.quantize(resolve(path), tmp_path / "out", QuantConfig("rtn"), progress=False)
        assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("make", [os.mkfifo, lambda p: p.symlink_to("nothing-there")])
def test_a_pipe_or_a_broken_link(capsys, tmp_path, model, make):
    (model / "tokenizer_config.json").unlink()
    make(model / "tokenizer_config.json")
    refused(capsys, tmp_path, "is neither a file nor a folder", model)


@pytest.mark.parametrize("file", ["config.json", "x" * 300 + ".safetensors", "\0.safetensors"])
def test_an_index_that_names_no_shard(capsys, tmp_path, model, file):
    index = {"weight_map": {"lm_head.weight": file}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(capsys, tmp_path, "model.safetensors.index.json", model)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": "\\ud800"}', '{"a": ' + "9" * 5000 + "}"])
def test_json_that_breaks_readers(capsys, tmp_path, model, text):
    (model / "config.json").write_text(text)
    refused(capsys, tmp_path, "config.json: cannot be read as JSON", model)


@pytest.mark.parametrize(
    "key, value",
    [("num_hidden_layers", 10**6), ("num_hidden_layers", 10**30), ("num_local_experts", 2**31),
     ("num_labels", 10**9), ("text_config", {"num_hidden_layers": 10**7})],
)  # fmt: skip
def test_counts_beyond_the_checkpoint_are_refused_at_once(capsys, tmp_path, model, key, value):
    edit_json(model / "config.json", **{key: value})
    started = time.monotonic()
    refused(capsys, tmp_path, "tensors in all; correct config.json", model)
    assert time.monotonic() - started < 5


def test_a_model_that_outgrows_its_checkpoint_while_it_is_built(capsys, tmp_path, model):
    edit_json(model / "config.json", num_hidden_layers=950)
    refused(capsys, tmp_path, "by config.json the model has more than", model)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"configuration_files": ["../x/config.1.0.0.json"]}, "must be in one file"),
        ({"num_experts_per_tok": -1}, "sends a token to -1 of 16 experts"),
        ({"hidden_act": 3}, "hidden_act"),
    ],
)
def test_configs_that_mislead(capsys, tmp_path, model, changes, message):
    edit_json(model / "config.json", **changes)
    refused(capsys, tmp_path, message, model)


@pytest.mark.parametrize(
    "changes, message",
    [({"n_group": 3}, "divides 8 experts into 3"), ({"topk_group": 5}, "chooses 5 of 4 groups")],
)
def test_groups_of_experts_that_do_not_fit(capsys, tmp_path, demo, changes, message):
    source = save_random("deepseek_v3", tmp_path / "source", demo, torch.bfloat16)
    edit_json(source / "config.json", **changes)
    refused(capsys, tmp_path, message, source, "--group-size", "32")


def test_experts_in_one_tensor_of_a_wrong_shape_are_found_before_the_work(capsys, tmp_path, model):
    tensors = load_file(model / "model.safetensors")
    part = [n for n in tensors if "layers.3.mlp.experts." in n and n.endswith("down_proj.weight")]
    stack = torch.stack([tensors.pop(n) for n in part])
    name = "model.layers.3.mlp.experts.down_proj"
    save_file(tensors | {name: stack[:, :, :64].clone()}, model / "model.safetensors")
    message = f"{name}: has shape (16, 256, 64), the model needs (16, 256, 128)"
    refused(capsys, tmp_path, message, model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.complex64])
def test_mxfp4_blocks_of_another_kind(capsys, tmp_path, demo, dtype):
    """int8 would decode, to other numbers."""
    source = tmp_path / "source"
    save_tiny(next(f for f in families() if f.model_type == "gpt_oss"), source)
    tensors = load_file(source / "model.safetensors")
    name = next(n for n in tensors if n.endswith("experts.down_proj"))
    E, K, N = tensors.pop(name).shape
    tensors[f"{name}_scales"] = torch.full((E, N, K // 32), 120, dtype=torch.uint8)
    tensors[f"{name}_blocks"] = torch.ones(E, N, K // 32, 16).to(dtype)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    edit_json(source / "config.json", quantization_config={"quant_method": "mxfp4"})
    refused(capsys, tmp_path, "; its format needs U8", source, "--group-size", "32")


@pytest.mark.parametrize(
    "text", ["{", "", "[]", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}']
)
def test_a_corrupt_tokenizer(capsys, tmp_path, model, text):
    (model / "tokenizer.json").write_text(text)
    refused(capsys, tmp_path, "cannot load its tokenizer", model)


def test_a_missing_tokenizer_is_called_missing(capsys, tmp_path, model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(capsys, tmp_path, "the folder has no tokenizer files", model)


def test_a_tokenizer_that_fails_on_some_characters(capsys, tmp_path, model):
    words = {"model": {"type": "WordLevel", "vocab": {"text": 0}, "unk_token": "[UNK]"}}
    Tokenizer.from_str(json.dumps(words)).save(str(model / "tokenizer.json"))
    refused(capsys, tmp_path, "cannot load its tokenizer", model)


def test_a_tokenizer_config_that_points_outside(capsys, tmp_path, model):
    edit_json(model / "tokenizer_config.json", tokenizer_file="../elsewhere/tokenizer.json")
    refused(capsys, tmp_path, "expected names of files in the folder", model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda r: r.update(digests="x"), "digests is x, not a dict"),
        (lambda r: r.pop("layers"), "layers is None, not a list"),
        (lambda r: r["layers"].insert(0, 3), "in its layers, AttributeError"),
        (lambda r: _entry(r).update(tokens=[]), "in its layers, IndexError"),
        (lambda r: _entry(r).update(routing_mass=["x"] * 16), "in its layers, ValueError"),
    ],
)
def test_a_report_that_was_changed(capsys, tmp_path, quantized_short, change, message):
    folder = shutil.copytree(quantized_short, tmp_path / "q")
    report = json.loads((folder / "qmoe_report.json").read_text())
    change(report)
    (folder / "qmoe_report.json").write_text(json.dumps(report))
    expect(capsys, f"qmoe_report.json: damaged ({message}", "inspect", folder, "--experts")


def _entry(report):
    return next(iter(report["layers"][0]["experts"].values()))


def test_packed_words_of_another_kind(tmp_path, quantized_short):
    folder = shutil.copytree(quantized_short, tmp_path / "q")
    file = folder / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("experts.3.down_proj.weight_packed"))
    save_file(tensors | {name: tensors[name].long()}, file)
    with pytest.raises(CheckpointError, match="is stored as torch.int64, the model needs"):
        qmoe.load(folder, progress=False)


def test_a_quantized_folder_with_a_scheme_of_words(capsys, tmp_path, quantized_short):
    folder = shutil.copytree(quantized_short, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    next(iter(config["quantization_config"]["config_groups"].values()))["weights"] |= {
        "group_size": "many"
    }
    (folder / "config.json").write_text(json.dumps(config))
    expect(capsys, "bad quantization_config", "inspect", folder)


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_against_the_same_config_with_other_weights(
    capsys, tmp_path, short, quantized_short, command
):
    model = shutil.copytree(short, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    expect(capsys, "same config, other weights", command, quantized_short, "--against", model)


def test_bench_of_what_is_not_quantized(capsys, demo):
    expect(capsys, "not quantized in compressed-tensors format", "bench", demo)
