"""Cutting and joining packed matrices gives the weights that cutting and joining them in 16 bits
gives, exactly."""

import pytest
import torch
from helpers import stored, weight

from qmoe.config import CHANNEL, Scheme
from qmoe.errors import CheckpointError, ConfigError
from qmoe.vllm_plugin.matrices import check_columns, cut_columns, cut_rows, join_rows, read

K = 256


SCHEMES = [(b, g, s) for b in (2, 3, 4, 8) for g in (32, 128, CHANNEL) for s in (True, False)]


@pytest.mark.parametrize("bits, group, symmetric", SCHEMES)
def test_parts_of_a_matrix_are_parts_of_its_weights(bits, group, symmetric):
    whole = read(stored(bits, group, symmetric), "w")
    assert whole.scheme == Scheme(bits, group, symmetric)
    expected = weight(whole)
    for start, size in ((0, 8), (8, 8), (7, 5), (23, 1)):
        assert torch.equal(weight(cut_rows(whole, start, size)), expected[start : start + size])
    for size in (128, 64, 32):  # at 64 and 32 groups of 128 go over the edges
        for start in range(0, K, size):
            part = cut_columns(whole, start, size, "w")
            assert part.k == size
            assert torch.equal(weight(part), expected[:, start : start + size])
    both = cut_columns(cut_rows(whole, 3, 10), 64, 64, "w")
    assert torch.equal(weight(both), expected[3:13, 64:128])


def test_matrices_of_one_kind_are_joined_and_others_are_not():
    a, b, c, d = (
        read(stored(bits, 64, symmetric, n, seed=i), "w")
        for i, (bits, symmetric, n) in enumerate([(4, False, 24), (4, False, 7), (2, False, 5),
                                                 (4, True, 8)])
    )  # fmt: skip
    joined = join_rows([a, b, c, d])
    assert [one.scheme.bits for one in joined] == [4, 2, 4]
    assert torch.equal(weight(joined[0]), torch.cat([weight(a), weight(b)]))
    assert torch.equal(weight(joined[1]), weight(c))


def test_what_is_read_is_checked():
    tensors = stored()
    for missing in ("_packed", "_scale", "_shape"):
        with pytest.raises(CheckpointError, match=f"w: the checkpoint has no weight{missing}"):
            read({s: t for s, t in tensors.items() if s != missing}, "w")
    with pytest.raises(CheckpointError, match=r"w: expected the tensors of a matrix \[24, 256\]"):
        read(tensors | {"_packed": tensors["_packed"][:, :-1]}, "w")
    with pytest.raises(CheckpointError, match="expected the tensors"):
        read(tensors | {"_scale": tensors["_scale"][:-1]}, "w")
    with pytest.raises(CheckpointError, match="not positive numbers"):
        read(tensors | {"_scale": tensors["_scale"] - 2}, "w")


@pytest.mark.parametrize(
    "scheme, size, reason",
    [
        (Scheme(4, CHANNEL), 4, "4 values of 4 bits are no whole words"),
        (Scheme(3, 32), 48, "48 values of 3 bits are no whole words"),
        (Scheme(4, 32), 16, "groups of 32 would become groups of 16"),
        (Scheme(4, 32, rotation=64), 32, "rotated in blocks of 64"),
    ],
)
def test_cuts_that_are_refused_by_name(scheme, size, reason):
    with pytest.raises(ConfigError, match=f"tensor parallel: down cannot be cut .*{reason}"):
        check_columns(scheme, 192, size, "down")
