"""What lies in a model folder beside the weights is kept or named; two models in one are refused;
a hub name brings what is read and nothing else."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import mostly_slow
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import qmoe
from qmoe import QuantConfig
from qmoe.checkpoint.folders import companions
from qmoe.checkpoint.reader import Checkpoint
from qmoe.cli.main import main
from qmoe.errors import CheckpointError

RTN = QuantConfig("rtn")


@pytest.fixture
def model(short, tmp_path):
    return shutil.copytree(short, tmp_path / "model")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def shard(model, files):
    """The model's tensors in `files` files with an index."""
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    where = {
        n: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, n in enumerate(names)
    }
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (model / "model.safetensors").unlink()
    return tensors, where


def refused(tmp_path, model, *said, commands=(qmoe.quantize, qmoe.load)):
    """They do not take it, and say why."""
    for command in commands:
        with pytest.raises(CheckpointError) as error:
            command(model, *([tmp_path / "out", RTN] if command is qmoe.quantize else []))
        assert all(words in str(error.value) for words in said), error.value
    assert not (tmp_path / "out").exists()


OTHERS = {
    "additional_chat_templates/tool_use.jinja": "{{ messages }} with tools",
    "chat_template.jinja": "{{ messages }}",
    "preprocessor_config.json": "{}",
    "custom_generate/generate.py": "",
    "custom_generate/deeper/notes.txt": "",
    "qwen.tiktoken": "",
    "vocab.spm": "",
}
FOREIGN = {
    "consolidated.safetensors": "",
    "model.gguf": "",
    "optimizer.pt": "",
    "pytorch_model.bin.index.json": "{}",
    "model.safetensors.index.fp16.json": "{}",
    "original/consolidated.00.pth": "",
    "original/params.json": "{}",
    "adapters/one/adapter_config.json": "{}",
    "adapters/one/adapter_model.safetensors": "",
}
LEFT = [
    "adapters/", "consolidated.safetensors", "model.gguf", "model.safetensors.index.fp16.json",
    "optimizer.pt", "original/", "pytorch_model.bin.index.json",
]  # fmt: skip
HIDDEN = {".gitattributes": "", ".cache/huggingface/x.lock": "", "__pycache__/a.pyc": ""}


def put(model, files):
    for name, text in files.items():
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text(text)


def test_every_file_without_weights_is_copied_and_all_else_is_named(tmp_path, model):
    before = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    put(model, OTHERS | FOREIGN | HIDDEN)
    report = qmoe.quantize(model, tmp_path / "out", RTN, progress=False)
    out = tmp_path / "out"
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    shards = {n for n in written if n.startswith("model-") or n.endswith("index.json")}
    assert len(shards) == 4
    ours = {"README.md", "qmoe_report.json"}
    assert written - shards == before - {"model.safetensors"} | set(OTHERS) | ours
    for name, text in OTHERS.items():
        assert (out / name).read_text() == text
    line = next(line for line in report["fallbacks"] if line.startswith("not copied"))
    assert line.endswith(": " + ", ".join(LEFT))
    _, tokenizer = qmoe.load(out, progress=False)
    expected = AutoTokenizer.from_pretrained(model).chat_template
    assert tokenizer.chat_template == expected and set(expected) == {"default", "tool_use"}


def test_a_folder_with_nothing_else_says_nothing(tmp_path, model):
    assert companions(model)[1] == []
    shard(model, 3)
    assert companions(model)[1] == []
    put(model, {"model-00003-of-00004.safetensors": ""})  # of an earlier download
    assert companions(model)[1] == ["model-00003-of-00004.safetensors"]


def test_links_in_folders_inside_the_folder(capsys, tmp_path, model):
    """They may not lead out; linked folders, which may lead in a circle, are not followed."""
    (tmp_path / "secret").write_text("secret")
    put(model, {"templates/a.jinja": ""})
    (model / "templates" / "again").symlink_to("..")
    files, left = companions(model)
    assert left == ["templates/"] and not [f for f in files if f.parts[0] == "templates"]
    (model / "templates" / "again").unlink()
    (model / "templates" / "b.jinja").symlink_to(tmp_path / "secret")
    assert main(["quantize", str(model), str(tmp_path / "out")]) == 1
    assert "templates/b.jinja is a link that leads out of the folder" in capsys.readouterr().err
    (model / "templates" / "b.jinja").unlink()
    os.mkfifo(model / "templates" / "b.jinja")
    assert main(["quantize", str(model), str(tmp_path / "out")]) == 1
    assert "templates/b.jinja is neither a file nor a folder" in capsys.readouterr().err


def test_what_is_copied_counts_before_the_work(capsys, tmp_path, model, monkeypatch):
    with (model / "large.txt").open("w") as file:
        file.truncate(1 << 40)  # a hole
    assert main(["quantize", str(model), str(tmp_path / "out"), "--method", "rtn"]) == 1
    assert "needs about 1.10 TB" in capsys.readouterr().err


def test_one_file_beside_an_index_of_others(tmp_path, model):
    tensors, where = shard(model, 2)
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    save_file(other, model / "model.safetensors", metadata={"format": "pt"})
    said = "holds two models, model.safetensors and the one in model-00001-of-00002.safetensors"
    refused(tmp_path, model, said, "model.safetensors.index.json")
    for file in set(where.values()):  # an index that was left behind is no better
        (model / file).unlink()
    refused(tmp_path, model, said)


def test_an_index_that_names_the_one_file(tmp_path, model):
    tensors = load_file(model / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(Checkpoint(model).names()) == set(tensors)


@pytest.mark.parametrize("last", [False, True])
def test_a_tensor_in_two_shards(tmp_path, model, last):
    tensors, where = shard(model, 2)
    name = "model.layers.1.mlp.gate.weight"
    one, two = sorted(set(where.values()))
    other = two if where[name] == one else one
    held = load_file(model / other) | {name: tensors[name] + 1}
    save_file(held, model / other)
    where[name] = other if last else where[name]  # the index may point to either
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refused(tmp_path, model, f"{name!r} is in {one} and in {two}")


def test_a_parameter_under_two_names(tmp_path, model):
    """Expert by expert and in one tensor; with the model's prefix and without."""
    tensors = load_file(model / "model.safetensors")
    one = "layers.1.mlp.gate.weight"
    twice = tensors | {one: tensors[f"model.{one}"] + 1}
    save_file(twice, model / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, model, f"stored more than once: '{one}'", commands=[qmoe.quantize])
    experts = "model.layers.1.mlp.experts"
    down = torch.stack([tensors[f"{experts}.{e}.down_proj.weight"] for e in range(16)])
    twice = tensors | {f"{experts}.down_proj": down + 1}
    save_file(twice, model / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, model, f"'{experts}.down_proj'", commands=[qmoe.quantize])


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter(tmp_path, model, whole):
    edit = {"base_model_name_or_path": "someone/base", "peft_type": "LORA"}
    (model / "adapter_config.json").write_text(json.dumps(edit))
    if not whole:
        (model / "model.safetensors").rename(model / "adapter_model.safetensors")
    refused(tmp_path, model, "adapter of 'someone/base'", "merge_and_unload")


def test_other_weights_named_in_the_config(tmp_path, model):
    shutil.copyfile(model / "model.safetensors", model / "other.safetensors")
    edit_json(model / "config.json", transformers_weights="other.safetensors")
    refused(tmp_path, model, "transformers_weights ('other.safetensors')")
    edit_json(model / "config.json", transformers_weights="model.safetensors")
    qmoe.quantize(model, tmp_path / "out", RTN, progress=False)
    qmoe.load(tmp_path / "out", progress=False)
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize(
    "file", ["consolidated.safetensors", "original/consolidated.00.pth", "model.gguf"]
)
def test_a_model_in_another_layout_alone(tmp_path, model, file):
    (model / file).parent.mkdir(exist_ok=True)
    (model / "model.safetensors").rename(model / file)
    refused(tmp_path, model, f"it has {file}", "convert it")


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's interface as a download takes. `folder` is the repository, `asked` the
    files that were fetched."""

    folder: Path
    asked: list[str]
    SHA = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, body):
        path = self.path.partition("?")[0]
        headers = {"Content-Type": "application/json"}
        if path.startswith("/api/models/"):
            files = [p for p in self.folder.rglob("*") if p.is_file()]
            tree = [
                {"type": "file", "path": str(p.relative_to(self.folder)), "size": p.stat().st_size,
                 "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                for p in files
            ]  # fmt: skip
            about = {"id": "maker/model", "sha": self.SHA}
            data = json.dumps(tree if "/tree/" in path else about).encode()
        else:
            name = path.partition("/resolve/")[2].partition("/")[2]
            if not (self.folder / name).is_file():
                return self.send_error(404)
            data = (self.folder / name).read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": self.SHA}
            if body:
                self.asked.append(name)
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("shards", mostly_slow([(1,), (3,)], lambda shards: shards == 3))
def test_what_a_hub_name_downloads(tmp_path, model, shards):
    """Then again without a network. Each in a process of its own: the library reads its settings
    once."""
    if shards > 1:
        shard(model, shards)
        put(model, {"model-00001-of-00002.safetensors": ""})
    put(model, {n: t + " " * i for i, (n, t) in enumerate((OTHERS | FOREIGN | HIDDEN).items())})
    read = {str(p.relative_to(model)) for p in model.rglob("*") if p.is_file()}
    read -= {*FOREIGN, *HIDDEN, "model-00001-of-00002.safetensors"}
    read |= {n for n in FOREIGN if n.endswith(".json") and not n.startswith("original")}
    handler = type("Handler", (Hub,), {"folder": model, "asked": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NO_PROXY": "127.0.0.1",
        "HF_HUB_OFFLINE": "0",
    }  # fmt: skip
    code = "from qmoe.checkpoint.folders import resolve; print(resolve('maker/model'))"
    printed = []
    try:
        for offline in ("0", "1"):
            command = [sys.executable, "-P", "-W", "ignore", "-c", code]
            done = subprocess.run(
                command, capture_output=True, text=True, env=env | {"HF_HUB_OFFLINE": offline}
            )
            assert done.returncode == 0, done.stderr
            printed.append(done.stdout)
            server.shutdown() if offline == "0" else None
    finally:
        server.server_close()
    assert sorted(handler.asked) == sorted(read)
    assert printed[0] == printed[1]
    assert len(Checkpoint(Path(printed[0].strip())).names()) == len(Checkpoint(model).names())
