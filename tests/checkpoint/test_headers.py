"""A model of the Hub of which only config.json and the headers of weights are there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import save_random
from huggingface_hub.errors import LocalEntryNotFoundError, NotASafetensorsRepoError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
from huggingface_hub.utils._safetensors import TensorInfo
from safetensors import safe_open

from qmoe.checkpoint import headers
from qmoe.checkpoint.headers import find_headers, write_header
from qmoe.errors import CheckpointError
from qmoe.model.source import open_source


def metadata(folder):
    """What `get_safetensors_metadata` says of a folder."""
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        length = int.from_bytes(path.read_bytes()[:8], "little")
        header = json.loads(path.read_bytes()[8 : 8 + length])
        info = header.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(t["dtype"], t["shape"], tuple(t["data_offsets"]))
            for name, t in header.items()
        }
        files[path.name] = SafetensorsFileMetadata(info, tensors)
    where = {name: file for file, header in files.items() for name in header.tensors}
    return SafetensorsRepoMetadata(None, len(files) > 1, where, files)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Puts a folder on a pretended Hub; returns what was asked of it."""
    asked = []

    def put(folder, name="org/model"):
        def download(repo, allow_patterns, revision=None):
            asked.append((repo, allow_patterns))
            if repo != name:
                raise LocalEntryNotFoundError(f"no {repo} here")
            cached = tmp_path / "snapshots" / "1234abcd"
            cached.mkdir(parents=True, exist_ok=True)
            for path in folder.iterdir():
                if any(path.match(pattern) for pattern in allow_patterns):
                    shutil.copyfile(path, cached / path.name)
            return str(cached)

        class Api:
            def get_safetensors_metadata(self, repo, revision):
                asked.append((repo, revision))
                if not list(folder.glob("*.safetensors")):
                    raise NotASafetensorsRepoError(f"'{repo}' is not a safetensors repo")
                return metadata(folder)

        monkeypatch.setattr(headers, "snapshot_download", download)
        monkeypatch.setattr(headers, "HfApi", Api)
        return asked

    return put


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hub_name_opens_as_the_folder_does(demo, tmp_path, hub, shards):
    source = save_random("qwen2_moe", tmp_path / "m", demo, torch.bfloat16)
    if shards > 1:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        shutil.rmtree(source)
        model.save_pretrained(source, max_shard_size="600KB")
        assert len(list(source.glob("*.safetensors"))) > 1
    asked = hub(source)
    with find_headers("org/model") as folder:
        found = open_source(folder, torch.float32)
        real = open_source(headers.ModelFolder.find(source), torch.float32)
        assert found.checkpoint.config == real.checkpoint.config
        assert sorted(found.checkpoint.names()) == sorted(real.checkpoint.names())
        for name in real.checkpoint.names():
            assert found.checkpoint.lazy(name).get_shape() == real.checkpoint.lazy(name).get_shape()
            assert found.checkpoint.dtype(name) == real.checkpoint.dtype(name)
        assert {p.suffix for p in folder.path.iterdir()} == {".json", ".safetensors"}
        taken = sum(path.stat().st_blocks * 512 for path in folder.path.glob("*.safetensors"))
        assert taken < 100_000 < sum(p.stat().st_size for p in folder.path.glob("*.safetensors"))
        kept = folder.path
    assert not kept.exists()
    # Nothing but the config was downloaded, and the headers are those of the same revision.
    assert asked == [
        ("org/model", ["config.json", "adapter_config.json"]),
        ("org/model", "1234abcd"),
    ]


def test_code_is_downloaded_where_it_may_run(demo, hub):
    asked = hub(demo)
    with find_headers("org/model", trust_remote_code=True):
        assert asked[0][1][-1] == "*.py"


def test_a_local_folder_stays_what_it_is(demo, hub):
    asked = hub(demo)
    with find_headers(demo) as folder:
        assert folder.path == demo
    assert demo.is_dir() and not asked


def refused(name, said):
    with pytest.raises(CheckpointError, match=said), find_headers(name):
        pass


def test_no_safetensors_on_the_hub(tmp_path, hub):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    hub(tmp_path / "m")
    refused("org/model", "org/model: no headers .* not a safetensors repo")


def test_a_name_that_the_hub_does_not_have(demo, hub):
    hub(demo)
    refused("no/such", "no/such: no such local folder, and the Hub did not")
    refused("./no/such/folder", "not a hub name")


def test_a_large_file_takes_no_space(tmp_path):
    path: Path = tmp_path / "model.safetensors"
    shape, size = [1 << 18, 1 << 15], 2 << 33
    tensors = {"a": {"dtype": "BF16", "shape": shape, "data_offsets": [0, size]}}
    write_header(path, tensors)
    assert path.stat().st_size > size and path.stat().st_blocks < 100
    with safe_open(path, framework="pt") as file:
        assert file.get_slice("a").get_shape() == shape
