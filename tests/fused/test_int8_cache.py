"""A cache in 8 bits beside transformers' own."""

from typing import get_args

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticCache

import qmoe
from qmoe.config import Kv
from qmoe.errors import ConfigError
from qmoe.fused.int8_cache import Int8Layer, decode, encode, to_int8
from qmoe.packed.load import _check_choice


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_states_come_back_within_half_a_step(dtype):
    states = (torch.randn(2, 3, 5, 8) * torch.logspace(-3, 2, 5)[:, None]).to(dtype)
    states[0, 0, 0] = 0
    kept = encode(states)
    assert kept.dtype == torch.int8 and kept.shape == (2, 3, 5, 8 + dtype.itemsize)
    largest = states.float().abs().amax(-1, keepdim=True)
    # A half step, and what the scale and the product lose in their own dtype.
    allowed = largest * (0.5 / 127 + 2 * torch.finfo(dtype).eps)
    error = (decode(kept, dtype).float() - states.float()).abs()
    assert (error <= allowed).all() and not decode(kept, dtype)[0, 0, 0].any()


def caches(dtype=torch.bfloat16):
    plain, small = DynamicCache(), DynamicCache()
    keys, values = torch.randn(2, 3, 5, 64, dtype=dtype), torch.randn(2, 3, 5, 32, dtype=dtype)
    for cache in (plain, small):
        cache.update(keys, values, 0)
    to_int8(small)
    return plain, small


def append(pair, tokens=1, batch=2):
    keys = torch.randn(batch, 3, tokens, 64, dtype=torch.bfloat16)
    values = torch.randn(batch, 3, tokens, 32, dtype=torch.bfloat16)
    found = [cache.update(keys, values, 0) for cache in pair]
    for whole, rounded in zip(*found, strict=True):
        assert rounded.dtype == whole.dtype and rounded.shape == whole.shape
        assert (rounded - whole).abs().max() < 0.05
    return found[1]


def test_half_the_memory_of_sixteen_bits():
    plain, small = caches()
    append((plain, small), 7)
    assert type(small.layers[0]) is Int8Layer
    before = plain.layers[0].keys.nbytes + plain.layers[0].values.nbytes
    after = small.layers[0].keys.nbytes + small.layers[0].values.nbytes
    assert after == before // 2 + 2 * (2 * 3 * 12 * 2)  # two bytes for each token's scale


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-2),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
        lambda cache: cache.batch_select_indices(torch.tensor([1, 0])),
    ],
)
def test_what_generate_does_with_caches(change):
    pair = caches()
    append(pair)
    for cache in pair:
        change(cache)
    append(pair, 3)
    assert pair[0].get_seq_length() == pair[1].get_seq_length()


def test_what_is_rounded_once_stays_as_it_is():
    pair = caches()
    first, _ = append(pair)
    again, _ = append(pair)
    assert torch.equal(again[:, :, :-1], first)


def test_a_model_that_keeps_its_cache_in_8_bits(quantized_short):
    plain, _ = qmoe.load(quantized_short, torch.float32, progress=False)
    small, _ = qmoe.load(quantized_short, torch.float32, progress=False, kv="int8")
    ids = torch.arange(60, 90)[None]
    with torch.no_grad():
        want = plain(input_ids=ids).logits[0, -1].log_softmax(-1)
        first = small(input_ids=ids[:, :-1], use_cache=True)
        assert all(type(layer) is Int8Layer for layer in first.past_key_values.layers)
        second = small(input_ids=ids[:, -1:], past_key_values=first.past_key_values)
        got = second.logits[0, -1].log_softmax(-1)
    kl = (want.exp() * (want - got)).sum()
    assert 0 < kl < 1e-3
    made = small.generate(ids, max_new_tokens=4, do_sample=False)
    assert made.shape == (1, 34)


def test_a_cache_that_stays_as_it_is_is_told_of_once(quantized_short, capsys):
    model, _ = qmoe.load(quantized_short, torch.float32, progress=False, kv="int8")
    ids = torch.arange(60, 70)[None]
    for _ in range(2):
        cache = StaticCache(model.config, max_cache_len=32)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=cache)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "kv:" in line]
    assert line.startswith("warning: kv: StaticCache has no whole keys and values")


def test_another_cache_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"kv: expected one of \('bf16', 'int8'\), got 'fp8'"):
        _check_choice("kv", "fp8", get_args(Kv))
