"""The launch choice and the recognition of activations: pure functions."""

import json
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from qmoe.kernels import launch
from qmoe.kernels.activation import Activation, recognize
from qmoe.kernels.device.activation import FUSED
from qmoe.kernels.device.target import ARCHITECTURES
from qmoe.kernels.launch import CONFIGS, Tile
from qmoe.kernels.layer import INTERPRETER

TABLES = {arch: launch.table_for("unknown device", arch) for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_table_is_whole(arch):
    table = TABLES[arch]
    assert table.arch == arch and table.ptx == arch.startswith("sm")
    assert set(table.tiles) == {"light", "heavy", "fine", "fine_heavy"}
    assert all(16 in tiles for tiles in table.tiles.values())  # so any two classes share a BM


def test_tables_on_disk_are_those_of_the_architectures():
    """And of devices that somebody timed."""
    found = {p.stem: launch.read_table(p) for p in CONFIGS.glob("*.json")}
    assert set(ARCHITECTURES) <= set(found)
    for name in set(found) - set(ARCHITECTURES):
        assert found[name].source.startswith(f"timed on {name.replace('_', ' ')}")


def test_an_unknown_architecture_is_named():
    with pytest.raises(ValueError, match=r"Voodoo \(gfx1\): no kernels for it; there are for"):
        launch.table_for("Voodoo", "gfx1")
    with pytest.raises(ValueError, match="sm75"):
        launch.table_for("RTX 2080", "sm75")


@pytest.mark.parametrize("arch, used", [("sm87", "sm86"), ("sm103", "sm89"), ("sm121", "sm120")])
def test_relatives_take_the_nearest_older_table(arch, used):
    assert launch.table_for("a device", arch).arch == used


def test_a_table_of_the_device_itself_wins(tmp_path, monkeypatch):
    raw = json.loads((CONFIGS / "sm89.json").read_text()) | {"source": "timed"}
    (tmp_path / "NVIDIA_GeForce_RTX_4090.json").write_text(json.dumps(raw))
    monkeypatch.setattr(launch, "CONFIGS", tmp_path)
    assert launch.table_for("NVIDIA GeForce RTX 4090", "sm89").source == "timed"


def test_the_class_of_a_tile():
    assert launch.tile_class(4, 128) == "light" and launch.tile_class(3, 0) == "light"
    assert launch.tile_class(8, 64) == "heavy" and launch.tile_class(0, 128) == "heavy"
    assert launch.tile_class(2, 32) == "fine" and launch.tile_class(0, 32) == "fine_heavy"


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("assignments", [8, 400, 4000])
def test_matrices_of_two_classes_share_a_block_size(arch, assignments):
    pairs = [(4, 128), (0, 32)]
    tiles = launch.choose_tiles(TABLES[arch], pairs, assignments, 16)
    assert tiles[0].BM == tiles[1].BM
    assert tiles == [TABLES[arch].tiles[launch.tile_class(*p)][tiles[0].BM] for p in pairs]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_grow_with_rows_per_expert(arch):
    sizes = [launch.choose_tile(TABLES[arch], 4, 128, n, 8).BM for n in range(1, 2000, 7)]
    assert sizes == sorted(sizes) and sizes[0] == min(TABLES[arch].tiles["light"])
    assert sizes[-1] == max(TABLES[arch].tiles["light"])


def test_one_token_takes_the_smallest_block():
    assert launch.choose_tile(TABLES["sm89"], 4, 128, 8, 128).BM == 8
    assert launch.choose_tile(TABLES["sm89"], 4, 128, 64, 1).BM == 64


def test_k_is_split_only_to_fill_the_device():
    tile = Tile(8, 128, 4, 3)
    assert launch.choose_split(tile, 8, 128, 2048, 768, 256) == 1  # too few K tiles
    assert launch.choose_split(tile, 2, 8, 4096, 14336, 256) == 4
    assert launch.choose_split(tile, 4096, 128, 2048, 14336, 256) == 1  # enough programs
    for n, k in product((512, 4096), (256, 1024, 14336)):
        split = launch.choose_split(tile, 1, 8, n, k, 340)
        assert split <= launch.LARGEST_SPLIT and (split == 1 or k // 256 // split >= 2)


@pytest.mark.parametrize("bits, most", [(2, 128), (4, 128), (8, 128), (3, 64), (0, 64)])
def test_widths_with_whole_steps_take_no_tile_of_128_rows(bits, most):
    timed = launch.table_for("NVIDIA H100 80GB HBM3", "sm90")
    rows = launch.choose_tile(timed, bits, 128, 100_000, 8).BM
    assert rows == most


def test_few_programs_take_narrow_tiles():
    wide = Tile(8, 128, 4, 3)
    assert launch.few_programs(wide, 8, 128, 1536, 264)  # 96 programs
    assert not launch.few_programs(wide, 64, 128, 1536, 264)
    assert not launch.few_programs(Tile(16, 128, 4, 3), 8, 128, 1536, 264)
    timed = launch.table_for("NVIDIA H100 80GB HBM3", "sm90")
    assert timed.early and timed.narrow["light"].BN < timed.tiles["light"][8].BN
    assert all(tile.BM == 8 for tile in timed.narrow.values())


def test_inline_search_covers_small_batches_only():
    for n in range(1, 257):
        assert launch.inline_width(n, 2, 256) >= n
    assert launch.inline_width(257, 2, 256) == launch.inline_width(65, 2, 64) == 0
    assert launch.inline_width(300, 1, 256) == 1


@pytest.mark.parametrize("seed", range(20))
def test_no_routing_needs_more_tiles_than_the_bound(seed):
    generator = torch.Generator().manual_seed(seed)
    E, P = 1 + seed, int(torch.randint(1, 300, (1,), generator=generator))
    ids = torch.randint(E, (P,), generator=generator) // (1 + seed % 3)
    for BM in (8, 16, 64):
        tiles = (-(-torch.bincount(ids, minlength=E) // BM)).sum()
        assert tiles <= launch.most_tiles(P, E, BM)


def test_large_batches_expand():
    assert not launch.use_dense(TABLES["sm90"], 255 * 8, 8)
    assert launch.use_dense(TABLES["sm90"], 256 * 8, 8)
    assert launch.use_dense(INTERPRETER, 256, 1)
    timed = launch.table_for("NVIDIA H100 80GB HBM3", "sm90")
    assert not launch.use_dense(timed, 10_000 * 8, 8) and timed.linear_rows == 256


TORCH = {
    "silu": lambda g, u: F.silu(g) * u,
    "gelu": lambda g, u: F.gelu(g) * u,
    "gelu_tanh": lambda g, u: F.gelu(g, approximate="tanh") * u,
    "clamped_swiglu": lambda g, u: (
        g.clamp(max=7) * torch.sigmoid(1.702 * g.clamp(max=7)) * (u.clamp(-7, 7) + 1)
    ),
}


def gated(function):
    return lambda product: function(*product.chunk(2, -1))


@pytest.mark.parametrize("name", FUSED)
def test_fused_activations_are_recognized_by_what_they_compute(name):
    assert recognize(gated(TORCH[name]), 8) == Activation(name)


@pytest.mark.parametrize(
    "function",
    [
        lambda g, u: F.relu(g).square() * u,
        lambda g, u: F.silu(u) * g,
        lambda g, u: F.silu(g) * u * 1.01,
        lambda g, u: F.silu(g.clamp(max=10)) * u,
        lambda g, u: F.silu(g) * (u + 1),
    ],
)
def test_what_is_nearly_a_fused_activation_is_none(function):
    assert recognize(gated(function), 8) is None


def test_clamps_of_other_sizes_need_their_own_constants():
    function = gated(
        lambda g, u: g.clamp(max=5) * torch.sigmoid(1.5 * g.clamp(max=5)) * (u.clamp(-5, 5) + 1)
    )
    assert recognize(function, 8) is None
    assert recognize(function, 8, alpha=1.5, limit=5.0) == Activation("clamped_swiglu", 1.5, 5.0)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="activation 'swish': the fused ones are"):
        Activation("swish")
