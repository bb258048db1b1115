"""The next layer's bytes are read while a layer is solved, and nothing depends on it."""

import json
import threading

import torch
from safetensors.torch import save_file

import qmoe
from qmoe import QuantConfig, Scheme
from qmoe.checkpoint import prefetch
from qmoe.checkpoint.reader import Checkpoint


def test_what_is_read_is_the_tensors(tmp_path, monkeypatch):
    tensors = {"a": torch.arange(5), "b": torch.randn(3, 7), "none": torch.empty(0)}
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    stored = path.read_bytes()
    for name, tensor in tensors.items():
        [(begin, end)] = prefetch._spans(path, {name})
        assert stored[begin:end] == tensor.numpy().tobytes()
    monkeypatch.setattr(prefetch, "PIECE", 8)  # a tensor takes several
    assert prefetch._read({path: set(tensors)}) == sum(t.nbytes for t in tensors.values())


def test_reading_stops_where_the_process_ends(tmp_path, monkeypatch):
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    thread = prefetch.read_ahead({tmp_path / "model.safetensors": {"a"}})
    assert not thread.daemon  # one that is cut off aborts the process
    thread.join()
    monkeypatch.setattr(threading.main_thread(), "is_alive", lambda: False)
    assert prefetch._read({tmp_path / "model.safetensors": {"a"}}) == 0


def test_a_file_that_is_gone_is_left_to_who_needs_it(tmp_path):
    assert prefetch._read({tmp_path / "gone.safetensors": {"a"}}) == 0


def test_one_layer_ahead_is_read(tmp_path, demo, monkeypatch):
    asked = []
    monkeypatch.setattr("qmoe.pipeline.layers.read_ahead", asked.append)
    qmoe.quantize(demo, tmp_path / "out", QuantConfig(method="rtn", experts=Scheme(4, 32)))
    layers = json.loads((demo / "config.json").read_text())["num_hidden_layers"]
    checkpoint = Checkpoint(demo)
    for i, files in enumerate(asked, start=1):
        names = [n for n in checkpoint.names() if n.startswith(f"model.layers.{i}.")]
        assert names and files == checkpoint.files(names)
    assert len(asked) == layers - 1


def test_of_a_decoded_tensor_its_parts_are_read(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.show({"ab": (("a", "b"), lambda a, b: torch.cat([a, b]))})
    assert checkpoint.files(["ab"]) == {tmp_path / "model.safetensors": {"a", "b"}}
