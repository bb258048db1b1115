"""The output folder is whole or absent; unfinished work is gone on with, refused or removed."""

import errno
import json

import pytest
import torch
from safetensors.torch import load_file

from qmoe.errors import CheckpointError, ConfigError, OutputError
from qmoe.pipeline.checks import check_destination
from qmoe.pipeline.output import OutputFolder, Shard

SAME = {"source": "model", "damp": "0.01"}
FIRST, SECOND = {"a": torch.arange(6.0).view(2, 3)}, {"b": torch.ones(4, dtype=torch.int32)}


def folder(tmp_path, shards=2, fingerprint=SAME):
    return OutputFolder(tmp_path / "out", shards, fingerprint)


def begun(tmp_path, error=KeyboardInterrupt):
    """Leave a run behind that finished its first shard and ended with an error."""
    with folder(tmp_path) as out:
        out.write_shard(Shard(0, FIRST, None, {"a": "digest"}))
        raise error


def test_a_finished_folder_has_the_shards_their_index_and_nothing_else(tmp_path):
    with folder(tmp_path) as out:
        out.write_shard(Shard(0, FIRST, None, {}))
        assert not (tmp_path / "out").exists()
        out.write_shard(Shard(1, SECOND, None, {}))
        out.write_index()
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [*files, index]
    assert torch.equal(load_file(tmp_path / "out" / files[0])["a"], FIRST["a"])
    assert json.loads((tmp_path / "out" / index).read_text()) == {
        "metadata": {"total_size": 6 * 4 + 4 * 4},
        "weight_map": {"a": files[0], "b": files[1]},
    }
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_single_shard_needs_no_index(tmp_path):
    with folder(tmp_path, shards=1) as out:
        out.write_shard(Shard(0, FIRST, None, {}))
        out.write_index()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.safetensors"]


def test_finished_shards_are_there_for_the_next_run(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path)
    with folder(tmp_path) as out:
        assert out.finished == {0} and out.digests() == {"a": "digest"}
        assert torch.equal(out.read_shard(0)["a"], FIRST["a"])
        out.write_shard(Shard(1, SECOND, None, {}))
        out.write_index()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert list(index["weight_map"]) == ["a", "b"]  # what was read counts as written


def test_unfinished_work_on_something_else_is_refused_and_kept(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path)
    other = SAME | {"damp": "0.5"}
    with pytest.raises(OutputError, match=r"differs \(damp was 0.01, is 0.5\)"):
        folder(tmp_path, fingerprint=other).__enter__()
    assert folder(tmp_path).__enter__().finished == {0}


def test_with_nothing_finished_other_work_takes_the_place(tmp_path):
    killed = folder(tmp_path).__enter__()
    (killed.path / "config.json").write_text("{}")
    for lock in killed.locks:
        lock.release()
    with folder(tmp_path, fingerprint=SAME | {"damp": "0.5"}) as other:
        assert not other.finished and not (other.path / "config.json").exists()
        other.write_shard(Shard(0, FIRST, None, {}))


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:-1] + b"\7"], ids=["cut", "flip"]
)
def test_a_damaged_shard_is_found_when_it_is_read(tmp_path, damage):
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path)
    (shard,) = (tmp_path / "out.partial").glob("*.safetensors")
    shard.write_bytes(damage(shard.read_bytes()))
    with pytest.raises(OutputError, match="unfinished work is damaged"), folder(tmp_path) as out:
        out.read_shard(0)


@pytest.mark.parametrize(
    "error, stays",
    [
        (KeyboardInterrupt(), True),
        (CheckpointError("cannot be read now"), True),
        (ConfigError("would come again"), False),
        (OSError(errno.ENOSPC, "full"), True),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_stays_after_an_error(tmp_path, error, stays):
    full = isinstance(error, OSError)
    with pytest.raises(OutputError if full else type(error)) as raised:
        begun(tmp_path, error)
    assert not full or "the disk is full; run the same command again" in str(raised.value)
    assert [p.name for p in tmp_path.iterdir()] == (["out.partial"] if stays else [])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_nothing_stays_where_nothing_was_finished(tmp_path, error):
    with pytest.raises((KeyboardInterrupt, OutputError)) as raised, folder(tmp_path):
        raise error
    assert "nothing was left behind" in str(raised.value) or not isinstance(error, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_the_users_own_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("data")
    with pytest.raises(OutputError, match="in the way and not unfinished work"):
        folder(tmp_path).__enter__()
    assert (tmp_path / "out.partial" / "mine").read_text() == "data"


def test_a_destination_must_be_free_and_have_room(tmp_path):
    check_destination(tmp_path / "out", 1)
    with pytest.raises(OutputError, match="already exists"):
        check_destination(tmp_path, 1)
    with pytest.raises(OutputError, match="parent folder .* does not exist"):
        check_destination(tmp_path / "no" / "out", 1)
    with pytest.raises(OutputError, match="needs about .* TB"):
        check_destination(tmp_path / "out", 1 << 60)
