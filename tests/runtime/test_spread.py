"""A model on several devices, of which one is pretended: see pretend_device.py."""

import pretend_device
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

import qmoe
from qmoe.errors import ConfigError
from qmoe.runtime.run_on import place_of
from qmoe.runtime.spread import fill_up
from qmoe.system.devices import CPU

DEVICE = pretend_device.device()
IDS = torch.arange(60, 72)[None]
LAYERS = "model.layers."
SECOND = {"": "cpu", f"{LAYERS}1": "there"}


@pytest.fixture
def there(monkeypatch):
    """The pretended device by the name "there"; attention computed alike on both."""
    monkeypatch.setattr(
        "qmoe.runtime.run_on.find_device", lambda name: DEVICE if name == "there" else CPU
    )
    # A tensor of a class of its own cannot be on the pretended device, whose tensors are that.
    monkeypatch.setattr("qmoe.packed.loaded.add_placeholders", lambda model: None)
    with sdpa_kernel(SDPBackend.MATH):
        yield DEVICE


def load(folder, device_map):
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map=device_map)


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


def test_layers_on_two_devices_give_the_logits_of_one(quantized_short, there):
    expected = logits(load(quantized_short, {"": "cpu"}))
    model = load(quantized_short, SECOND)
    assert model.hf_device_map == {"": "cpu", f"{LAYERS}1": DEVICE}
    first, second = model.model.layers[0], model.model.layers[1]
    assert {p.device for p in first.parameters()} == {CPU}
    assert {p.device for p in second.parameters()} == {DEVICE}
    assert {b.device for b in second.buffers()} == {DEVICE}
    pretend_device.operations.clear()
    found = logits(model)
    assert pretend_device.operations["aten::mm"]
    assert found.device == CPU
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_generating_keeps_each_layers_cache_on_its_device(quantized_short, there):
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = load(quantized_short, {"": "cpu"}).generate(IDS, **how)
    out = load(quantized_short, SECOND).generate(IDS, return_dict_in_generate=True, **how)
    assert torch.equal(out.sequences, expected)
    assert [layer.keys.device for layer in out.past_key_values.layers[:2]] == [CPU, DEVICE]


def test_a_head_on_another_device_than_the_embedding_that_it_is_is_refused(quantized_short, there):
    tied = load(quantized_short, None).config.tie_word_embeddings
    device_map = {"": "cpu", "lm_head": "there"}
    if tied:
        with pytest.raises(ConfigError, match="are one tensor"):
            load(quantized_short, device_map)
    else:
        assert logits(load(quantized_short, device_map)).device == CPU


@pytest.mark.parametrize(
    "device_map, said",
    [
        ({"": "cpu", f"{LAYERS}0.mlp": "there"}, "give model.layers.0 alone"),
        ({"model": "cpu", f"{LAYERS}1": "there"}, "a device for every module"),
        ({"": "cpu", f"{LAYERS}77": "there"}, "no module 'model.layers.77'"),
    ],
)
def test_refusals(device_map, said, quantized_short, there):
    with pytest.raises(ConfigError, match=said):
        load(quantized_short, device_map)


def test_it_is_not_moved_afterwards(quantized_short, there):
    with pytest.raises(ConfigError, match="is on several"):
        load(quantized_short, SECOND).to("cpu")


def test_disk_is_refused(quantized_short):
    with pytest.raises(qmoe.QmoeError, match="expected cpu, cuda or cuda:N, got 'disk'"):
        load(quantized_short, {"": "cpu", "lm_head": "disk"})


def test_the_longest_name_counts():
    places = {"": CPU, "model": torch.device("cuda", 0), "model.layers.1": torch.device("cuda", 1)}
    found = [place_of(places, n) for n in ("lm_head", "model.norm", "model.layers.1.mlp", "model")]
    assert found == [CPU, *(torch.device("cuda", i) for i in (0, 1, 0))]
    assert place_of(places, "model.layers.10") == torch.device("cuda", 0)


@pytest.mark.parametrize(
    "free, expected",
    [
        ([1000], "0000"),  # all on one
        ([500], "000c"),  # 400 are for weights: the rest of 50 and three layers
        ([500, 1000], "0001"),
        ([100, 250, 500], "1122"),  # the rest alone on the first; 200 hold two layers
        ([10], "cccc"),
    ],
)
def test_a_map_fills_one_device_after_the_other(free, expected):
    gpus = [(torch.device("cuda", i), nbytes) for i, nbytes in enumerate(free)]
    layers = {f"{LAYERS}{i}": 100 for i in range(4)}
    places = fill_up(layers, 50, gpus)
    found = [place_of(places, name) for name in layers]
    assert "".join("c" if d == CPU else str(d.index) for d in found) == expected
    assert place_of(places, "model.embed_tokens") == gpus[0][0]
