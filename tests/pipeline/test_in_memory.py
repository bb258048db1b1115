"""Models, texts and batches that are in memory."""

import gc
import json
import shutil

import pytest
import torch
from helpers import ONE_DOMAIN
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import qmoe
from qmoe import CalibrationConfig, QuantConfig
from qmoe.calibration.given import samples_of_given
from qmoe.calibration.text import shipped_domains
from qmoe.errors import CalibrationError, ConfigError, OutputError

LITTLE = CalibrationConfig(ONE_DOMAIN, samples=4, seqlen=64, batch=2, self_samples=0)
QUICK = QuantConfig(search_grid=False, refit=False, calibration=LITTLE)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(demo):
    return AutoTokenizer.from_pretrained(demo)


@pytest.fixture(scope="module")
def original(short):
    return AutoModelForCausalLM.from_pretrained(short)


def test_it_gives_what_quantize_gives_of_the_folder(
    original, tokenizer, short, tmp_path, monkeypatch
):
    """The same text in memory and in a file."""
    text = "It is a truth universally acknowledged, that a single man must want. " * 40
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "work").mkdir()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    packed = qmoe.quantize_model(
        original, tokenizer, [text], QUICK, work=tmp_path / "work", progress=False
    )
    assert all(torch.equal(tensor, before[n]) for n, tensor in original.state_dict().items())
    packed.save_pretrained(tmp_path / "saved")
    in_file = CalibrationConfig(str(tmp_path / "text.txt"), 4, 64, batch=2, self_samples=0)
    config = QuantConfig(search_grid=False, refit=False, calibration=in_file)
    qmoe.quantize(short, tmp_path / "file", config, progress=False)
    shards = sorted(path.name for path in (tmp_path / "file").glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "file" / name).read_bytes()
    again, loaded_tokenizer = qmoe.load(tmp_path / "saved", progress=False)
    ids = torch.arange(60, 72)[None]
    assert torch.equal(again(ids).logits, packed(ids).logits) and loaded_tokenizer is not None
    report = json.loads((tmp_path / "saved" / "qmoe_report.json").read_text())
    assert report["config"]["calibration"]["text"] == "given"
    assert len(list((tmp_path / "work").iterdir())) == 1
    del packed
    gc.collect()
    assert not list((tmp_path / "work").iterdir())


def test_batches_are_used_as_they_are():
    rows = torch.arange(24).view(4, 6)
    for batches in ([rows[:2], rows[2:]], DataLoader(rows, batch_size=3), rows.tolist(), [[rows]]):
        samples, notes = samples_of_given(None, batches, 1, 6, 0)
        assert torch.equal(samples, rows) and not notes
    padded = {"input_ids": rows, "attention_mask": (rows % 6 > 1).long()}
    samples, notes = samples_of_given(None, [padded], 1, 5, 0)
    assert samples.tolist()[0] == [2, 3, 4, 5, 8] and len(samples) == 3
    assert notes == ["text: 1 tokens behind the last whole sample are left out"]


def test_messages_go_through_the_chat_template(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE, raising=False)
    chat = [{"role": "user", "content": "How far is it to the sea from here?"}] * 5
    samples, _ = samples_of_given(tokenizer, [chat], 1, 16, 0)
    assert "<user>How" in tokenizer.decode(samples[0]) or "<user>" in tokenizer.decode(samples[0])
    rows = [{"messages": chat}, {"messages": chat}]
    assert len(samples_of_given(tokenizer, rows, 2, 16, 0)[0]) == 2
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(CalibrationError, match="no chat template"):
        samples_of_given(tokenizer, [chat], 1, 16, 0)


def test_rows_of_a_data_set(tokenizer):
    rows = [{"id": i, "text": "The sea was calm that day. " * 20} for i in range(3)]
    assert samples_of_given(tokenizer, rows, 3, 32, 0)[0].shape == (3, 32)


@pytest.mark.parametrize(
    "text, said",
    [
        ([], "empty or shorter than one sample"),
        ("bundled", "in a list or another iterable"),
        ([{"title": "x"}], "has .'title'."),
        ([torch.zeros(2, 3)], "no token ids"),
        ([torch.zeros(1, 3, dtype=torch.long)], "3 tokens, less than one sample of 64"),
        ([3.5], "item 0 holds"),
    ],
)
def test_what_is_no_text(text, said, tokenizer):
    with pytest.raises(CalibrationError, match=said):
        samples_of_given(tokenizer, text, 1, 64, 0)


def test_refusals(original, tokenizer, quantized_short, tmp_path, monkeypatch):
    assert shipped_domains()
    packed, _ = qmoe.load(quantized_short, progress=False)
    for model, said in ((packed, "quantized already"), (quantized_short, "qmoe.quantize")):
        with pytest.raises(ConfigError, match=said):
            qmoe.quantize_model(model, tokenizer, ["x"], QUICK)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(original.config)
    with pytest.raises(ConfigError, match="not in memory"):
        qmoe.quantize_model(empty, tokenizer, ["x"], QUICK)
    with pytest.raises(OutputError, match="is no folder"):
        qmoe.quantize_model(original, tokenizer, ["x"], QUICK, work=tmp_path / "nowhere")
    with pytest.raises(CalibrationError, match="shorter than one sample"):
        qmoe.quantize_model(original, tokenizer, ["x"], QUICK, work=tmp_path, progress=False)
    assert not list(tmp_path.iterdir())
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("qmoe.pipeline.in_memory.shutil.disk_usage", lambda path: usage)
    with pytest.raises(OutputError, match="name a folder on another disk"):
        qmoe.quantize_model(original, tokenizer, ["x"], QUICK, work=tmp_path)
