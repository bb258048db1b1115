"""A cache with room for tokens to come holds what a DynamicCache holds."""

import copy

import pytest
import torch
from transformers.cache_utils import DynamicCache

from qmoe.fused.growing_cache import GrowingLayer


def pair():
    caches = DynamicCache(), DynamicCache()
    keys, values = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 6)
    for cache in caches:
        cache.update(keys, values, 0)
    caches[1].layers[0].__class__ = GrowingLayer
    return caches


def append(caches, tokens=1, batch=2):
    keys, values = torch.randn(batch, 3, tokens, 4), torch.randn(batch, 3, tokens, 6)
    found = [cache.update(keys, values, 0) for cache in caches]
    for plain, grown in zip(*found, strict=True):
        assert plain.equal(grown)
    return found[1]


def test_tokens_are_appended_without_copying():
    caches = pair()
    first, _ = append(caches)
    places = {append(caches)[0].data_ptr() for _ in range(100)}
    assert places == {first.data_ptr()}
    append(caches, 1000)
    assert caches[1].get_seq_length() == 1106


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache.crop(-4),
        lambda cache: cache.crop(-1),
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
        lambda cache: cache.reset(),
    ],
)
def test_what_generate_does_with_caches(change):
    caches = pair()
    before, _ = append(caches)
    for cache in caches:
        change(cache)
    kept = before.clone()
    append(caches)
    append(caches, 3)
    assert before.equal(kept)  # what was cropped is not written over


def test_batches_that_are_repeated_or_chosen():
    caches = pair()
    append(caches)
    for cache in caches:
        cache.batch_repeat_interleave(3)
    append(caches, batch=6)
    for cache in caches:
        cache.batch_select_indices(torch.tensor([0, 5]))
    append(caches, batch=2)


def test_copies_go_their_own_ways():
    caches = pair()
    append(caches)
    copies = copy.deepcopy(caches)
    append(copies)
    append(caches)
    append(copies)


def test_in_inference_mode_and_out_of_it():
    with torch.inference_mode():
        caches = pair()
        append(caches)
        append(caches)
    append(caches)
    with torch.inference_mode():
        append(caches)
    append(caches)


def test_keys_with_gradients():
    caches = pair()
    append(caches)
    keys = torch.randn(2, 3, 1, 4, requires_grad=True)
    caches[1].update(keys, torch.randn(2, 3, 1, 6), 0)[0].sum().backward()
    assert keys.grad is not None
