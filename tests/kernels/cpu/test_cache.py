"""The cache file: what was written comes back mapped; what is damaged or foreign is made again."""

import hashlib
import os
import sys
import threading

import pytest
import torch

from qmoe.kernels.activation import Activation
from qmoe.kernels.cpu import cache
from qmoe.kernels.cpu.cache import PAGE, StaleCache, cache_key, cached, open_cache, write_cache
from qmoe.kernels.cpu.layout import Packed, arrange
from qmoe.kernels.cpu.library import tier
from qmoe.kernels.cpu.stack import CpuStack
from qmoe.kernels.reference import random_matrices

BRAIN = torch.bfloat16
KEY = cache_key(["digest of the shards", "silu"])


def tensors():
    return {
        "first": torch.randint(0, 256, (3 * PAGE + 100,), dtype=torch.uint8),
        "second": torch.randint(0, 256, (2 * PAGE,), dtype=torch.uint8),
        "scales": torch.randn(5, 7),
        "none": torch.empty(0, dtype=torch.uint8),
    }


@pytest.fixture
def file(tmp_path):
    path, made = tmp_path / "a.cache", tensors()
    write_cache(path, KEY, made)
    return path, made


def same(found, wanted):
    return list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


def test_what_was_written_comes_back(file):
    path, made = file
    found = open_cache(path, KEY)
    assert same(found, made)
    assert all(t.data_ptr() % PAGE == 0 for t in found.values() if t.numel())
    found["first"].zero_()  # a private page: the file stays
    assert same(open_cache(path, KEY), made)
    assert os.listdir(path.parent) == [path.name]


def test_a_flipped_byte_in_any_page_is_found(file):
    path, _ = file
    whole = path.read_bytes()
    for at in [*range(7, len(whole), PAGE), *range(0, 600, 13)]:
        if cache.HEAD + 600 < at < PAGE:
            continue
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
        used = at >= PAGE or at < cache.HEAD + int.from_bytes(whole[16:24], "little")
        if used:
            with pytest.raises(StaleCache):
                open_cache(path, KEY)


def test_pages_that_changed_places_are_found(file):
    path, _ = file
    whole = path.read_bytes()
    one, two = whole[PAGE : 2 * PAGE], whole[2 * PAGE : 3 * PAGE]
    path.write_bytes(whole[:PAGE] + two + one + whole[3 * PAGE :])
    with pytest.raises(StaleCache, match="first has changed"):
        open_cache(path, KEY)


def test_a_cut_file_is_found(file):
    path, _ = file
    whole = path.read_bytes()
    for size in [*range(0, len(whole), PAGE), *range(0, 700, 23), len(whole) - 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(StaleCache):
            open_cache(path, KEY)
    path.write_bytes(whole + b"more")
    with pytest.raises(StaleCache, match="expected .* bytes, found"):
        open_cache(path, KEY)


def test_another_key_or_version_is_another_file(file, monkeypatch):
    path, _ = file
    with pytest.raises(StaleCache, match="made of other weights or by another version"):
        open_cache(path, cache_key(["another digest", "silu"]))
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert cache_key(["digest of the shards", "silu"]) != KEY


@pytest.mark.parametrize(
    "change", ["{", "[1]", '{"key": KEY}', '{"key": KEY, "size": SIZE, "tensors": [5]}']
)
def test_an_index_that_makes_no_sense_is_found(file, change):
    path, _ = file
    whole = path.read_bytes()
    length = int.from_bytes(whole[16:24], "little")
    text = change.replace("KEY", f'"{KEY}"').replace("SIZE", str(len(whole) - PAGE)).encode()
    index = (text + b"\n").ljust(length, b"\0")
    head = whole[:24] + hashlib.sha256(index).digest() + index
    path.write_bytes(head + whole[len(head) :])
    with pytest.raises(StaleCache, match="index cannot be read"):
        open_cache(path, KEY)


def test_a_missing_file_is_built_and_a_bad_one_built_again_with_a_line(tmp_path, capsys):
    path, made, built = tmp_path / "new" / "a.cache", tensors(), []

    def build():
        built.append(1)
        return made

    assert same(cached(path, KEY, build), made) and same(cached(path, KEY, build), made)
    assert len(built) == 1 and capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-PAGE])
    assert same(cached(path, KEY, build), made) and same(open_cache(path, KEY), made)
    said = capsys.readouterr().err
    assert len(built) == 2 and said.count("\n") == 1 and "it is made again" in said


def test_a_full_disk_leaves_nothing_and_is_no_error(tmp_path, capsys, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    made = tensors()
    assert same(cached(tmp_path / "a.cache", KEY, lambda: made), made)
    assert "No space left on device; the next load has to prepare" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_where_it_is(tmp_path, monkeypatch):
    assert cache.cache_path(tmp_path, KEY) == tmp_path / f"qmoe_cpu_{KEY[:16]}.cache"
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_path(tmp_path, KEY).parent == tmp_path / "xdg" / "qmoe"


def test_several_build_at_once(tmp_path):
    path, made, results = tmp_path / "a.cache", tensors(), []
    threads = [
        threading.Thread(target=lambda: results.append(same(cached(path, KEY, lambda: made), made)))
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6 and os.listdir(tmp_path) == ["a.cache"]


def test_a_replaced_file_stays_as_it_was_where_it_is_mapped(file):
    path, made = file
    found = open_cache(path, KEY)
    write_cache(path, cache_key(["other"]), {"first": torch.zeros(1, dtype=torch.uint8)})
    assert same(found, made)


def test_pages_are_shared(tmp_path, forks):
    """Another process that maps 64 MB and reads them has little memory of its own."""
    path = tmp_path / "a.cache"
    write_cache(path, KEY, {"all": torch.ones(64 << 20, dtype=torch.uint8)})
    code = f"""
from pathlib import Path
from qmoe.kernels.cpu.cache import open_cache
def own():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty"))
before = own()
all = open_cache(Path({str(path)!r}), {KEY!r})["all"]
assert int(all.sum()) == 64 << 20
assert own() - before < 16 << 10, own() - before
"""
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    status, _, err = forks.run(code)
    assert status == 0, err


@pytest.mark.skipif(tier() is None, reason="installed without a C compiler")
def test_a_layer_runs_from_a_cache(tmp_path):
    """The bytes come from the file, all that steers access is arranged anew."""
    cpu, silu = torch.device("cpu"), Activation("silu")
    stacks = [random_matrices(3, n, k, (2, 4), 32, BRAIN, cpu) for n, k in ((64, 96), (96, 32))]
    stack = CpuStack(stacks, BRAIN, silu)
    made = {name: buffer for name, buffer in stack.named_buffers() if name.startswith("buffer")}
    found = cached(tmp_path / "a.cache", KEY, lambda: made)
    packed = []
    for i, matrices in enumerate(stacks):
        kinds = [(m.scheme.bits, m.scale.shape[-1], m.zero is not None) for m in matrices]
        n, k = matrices[0].q.shape[1:]
        shape, table, size = arrange(kinds, n, k, BRAIN, paired=i == 0)
        assert size == len(found[f"buffer{i}"]) and torch.equal(table, stack.packed(i).table)
        packed.append(Packed(shape, found[f"buffer{i}"], table))
    again = CpuStack(packed, BRAIN, silu)
    x, ids, gates = torch.randn(5, 96).to(BRAIN), torch.randint(0, 3, (5, 2)), torch.rand(5, 2)
    wanted = stack.experts(x, ids, gates, silu)
    assert torch.equal(again.experts(x, ids, gates, silu), wanted) and again.scheme == stack.scheme
