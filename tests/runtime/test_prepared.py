"""Weights that are kept in the CPU kernels' layout between loads."""

import os
import time

import pytest
import torch

import qmoe
import qmoe.packed.load
import qmoe.runtime.prepared
from qmoe.kernels.cpu.library import tier
from qmoe.runtime.prepared import cache_folder, prepared_files, remove_prepared

IDS = torch.arange(60, 70)[None]


@pytest.mark.skipif(tier() is None, reason="this installation has no CPU kernels")
def test_a_second_load_maps_the_file_and_a_damaged_one_is_made_again(
    quantized_short, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(qmoe.runtime.prepared, "WORTH", 0)
    first = qmoe.load(quantized_short, torch.bfloat16, progress=False)[0](input_ids=IDS).logits
    (file,) = (tmp_path / "qmoe").iterdir()
    assert str(file) in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("qmoe.runtime.modules.take_to_run", None)  # nothing is read to be packed
        again = qmoe.load(quantized_short, torch.bfloat16, progress=False)[0]
    assert torch.equal(again(input_ids=IDS).logits, first)
    file.write_bytes(file.read_bytes()[:-5000])
    third = qmoe.load(quantized_short, torch.bfloat16, progress=False)[0](input_ids=IDS).logits
    assert "it is made again" in capfd.readouterr().err and torch.equal(third, first)


def test_only_files_that_nothing_has_read_for_long_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "qmoe").mkdir()
    now = time.time()
    for name, days in (("old", 40), ("new", 3)):
        path = tmp_path / "qmoe" / f"{name}.cpu"
        path.write_bytes(b"1")
        os.utime(path, (now - days * 86400,) * 2)
    assert [file.path.stem for file in prepared_files()] == ["old", "new"]
    assert [file.path.stem for file in remove_prepared(unused_days=30)] == ["old"]
    assert [file.path.stem for file in prepared_files()] == ["new"]


def test_a_user_without_a_home_has_no_prepared_files(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() is None and prepared_files() == []
