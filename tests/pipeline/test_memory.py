"""What does not fit in memory waits on disk, changes nothing, and is refused if it cannot help."""

import gc
import os
from dataclasses import replace

import pytest
import torch
from helpers import ONE_DOMAIN, same_files, slow

import qmoe
from qmoe import CalibrationConfig, QuantConfig, Scheme
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import ConfigError
from qmoe.model.source import open_source
from qmoe.pipeline.memory import needed, spills
from qmoe.system.spill import Scratch

TEXT = CalibrationConfig(ONE_DOMAIN, samples=6, seqlen=128, batch=2, self_samples=0)
CONFIG = QuantConfig(experts=Scheme(4, 64), search_grid=False, calibration=TEXT)


def need(demo, tokens):
    return needed(open_source(ModelFolder(demo), torch.float32), CONFIG, tokens)


def test_kept_tensors_are_the_same_and_their_files_have_no_names(tmp_path):
    scratch = Scratch(tmp_path)
    x, small = torch.randn(300, 50), torch.ones(3)
    kept, same, rest = scratch.keep((x, small, None))
    assert torch.equal(kept, x) and kept.data_ptr() != x.data_ptr()
    assert same is small and rest is None
    assert list(tmp_path.iterdir()) == []
    kept[0] = 7  # pages given up when the next tensor comes are read back as they were left
    another = scratch.keep(torch.zeros(5000, dtype=torch.int64))
    assert kept[0].eq(7).all() and torch.equal(kept[1:], x[1:]) and another.dtype == torch.int64


def test_a_kept_tensor_lives_as_long_as_its_views(tmp_path):
    scratch = Scratch(tmp_path)
    part = scratch.keep(torch.arange(4096.0))[1000:]
    gc.collect()
    assert part[0] == 1000 and len(scratch._maps) == 1
    del part
    gc.collect()
    assert len(scratch._maps) == 0


def test_without_a_folder_tensors_stay():
    x = torch.randn(5000)
    assert Scratch().keep(x) is x


def test_no_room_on_disk_is_an_error_and_not_a_signal(tmp_path, monkeypatch):
    def full(fd, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Scratch(tmp_path).keep(torch.randn(5000))


@pytest.mark.parametrize("method", ["gptq", slow("awq")])
def test_waiting_on_disk_changes_no_byte(tmp_path, short, method, monkeypatch):
    source = short
    config = replace(CONFIG, method=method, search_grid=False, refit=method == "gptq")
    qmoe.quantize(source, tmp_path / "whole", config, progress=False)
    kept = []
    original = Scratch._keep
    monkeypatch.setattr(Scratch, "_keep", lambda self, t: kept.append(t) or original(self, t))
    limit = needed(open_source(ModelFolder(source), torch.float32), config, 6 * 128).fixed + 1000
    qmoe.quantize(source, tmp_path / "out", config, max_memory=limit, progress=False)
    assert kept and same_files(tmp_path / "whole", tmp_path / "out")


def test_activations_grow_with_the_text_and_nothing_else_does(demo):
    a, b = need(demo, 1000), need(demo, 8000)
    assert a.fixed == b.fixed and b.activations == 8 * a.activations
    assert not spills(a, a.fixed + a.activations) and spills(a, a.fixed + a.activations - 1)


def test_too_little_memory_is_refused_before_any_work(tmp_path, demo):
    with pytest.raises(
        ConfigError, match="needs about \\d+\\.\\d\\d MB, and 100.00 MB are allowed"
    ):
        qmoe.quantize(demo, tmp_path / "out", CONFIG, max_memory="100MB", progress=False)
    assert list(tmp_path.iterdir()) == []
