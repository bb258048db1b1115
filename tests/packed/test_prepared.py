"""Weights that are kept in the CPU kernels' layout between loads."""

import pytest
import torch

import qmoe
import qmoe.packed.load
import qmoe.packed.prepared
from qmoe.kernels.cpu.library import tier

IDS = torch.arange(60, 70)[None]


@pytest.mark.skipif(tier() is None, reason="this installation has no CPU kernels")
def test_a_second_load_maps_the_file_and_a_damaged_one_is_made_again(
    quantized_short, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(qmoe.packed.prepared, "WORTH", 0)
    first = qmoe.load(quantized_short, torch.bfloat16, progress=False)[0](input_ids=IDS).logits
    (file,) = (tmp_path / "qmoe").iterdir()
    assert str(file) in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("qmoe.packed.modules.take_to_run", None)  # nothing is read to be packed
        again = qmoe.load(quantized_short, torch.bfloat16, progress=False)[0]
    assert torch.equal(again(input_ids=IDS).logits, first)
    file.write_bytes(file.read_bytes()[:-5000])
    third = qmoe.load(quantized_short, torch.bfloat16, progress=False)[0](input_ids=IDS).logits
    assert "it is made again" in capfd.readouterr().err and torch.equal(third, first)
