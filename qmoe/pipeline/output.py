"""Writing a model folder so that it is either whole or absent, and unfinished work can go on."""

import errno
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from qmoe.checkpoint.folders import INDEX, SINGLE, companions
from qmoe.errors import CheckpointError, OutputError, QmoeError
from qmoe.layer.records import LayerRecord
from qmoe.solved.solved_cache import SolvedCache
from qmoe.system import distributed
from qmoe.system.files import CONTENT, content_sha256, sha256, write_json, write_safetensors
from qmoe.system.lock import NAME, Lock

MARKER = ".qmoe-partial"  # what is being written
NOTE = ".qmoe-shard-{}.json"  # what was done for a finished shard
SELF_TEXT = ".qmoe-self-text.safetensors"  # calibration text sampled from the model
DISTILLED = ".qmoe-distilled.safetensors"  # scales and other values, until all shards have them
COPY = ".qmoe-copy"  # a small copy of the model while it is sampled from
# Of what lies in an unfinished folder; another number wherever an older one would be misread.
LAYOUT = "2"


@dataclass(frozen=True)
class Shard:
    """A part of the model as it is stored. index: its place, 0-based. tensors: by name. record:
    what was done to it, if it was quantized. digests: of every quantized stack as it was solved, by
    parameter, to be compared with what was written."""

    index: int
    tensors: dict[str, Tensor]
    record: LayerRecord | None
    digests: dict[str, str]


class OutputFolder:
    """A folder under a temporary name beside `dst`, renamed to it when the `with` block ends well.

    Each finished shard is there whole, with a note of what was done for it, and so are the solved
    experts of the one being worked on. If the block is interrupted, the disk fills or the source
    cannot be read, the folder stays, and a later run with the same fingerprint (source, settings,
    text, versions) goes on from there. After any other error, or with nothing finished, it is
    removed. It is locked all the while (system/lock.py), and so is the folder `saved` of
    statistics. Of several processes rank 0 writes; the others see the same folder.
    """

    def __init__(
        self, dst: Path, shards: int, fingerprint: dict[str, str], saved: Path | None = None
    ):
        self.dst, self.shards, self.fingerprint = dst, shards, {"layout": LAYOUT} | fingerprint
        self.path = dst.with_name(dst.name + ".partial")
        self.solved_cache = SolvedCache(self.path)
        self.saved = saved
        self.locks = [Lock(folder) for folder in (self.path, saved) if folder is not None]
        self.leads = distributed.rank() == 0  # of several processes, one writes
        self.finished: frozenset[int] = frozenset()  # shards of an earlier run
        self._weight_map: dict[str, str] = {}
        self._bytes: dict[int, int] = {}

    def __enter__(self) -> "OutputFolder":
        refused: OutputError | None = None
        if self.leads:
            try:
                self._begin()
            except OutputError as error:
                refused = error
                self._release()
                with suppress(OSError):  # it may be more than an empty folder
                    self.path.rmdir()
        if (said := distributed.broadcast(refused)) is not None:
            raise said
        self.finished = distributed.broadcast(frozenset(self._notes()))
        return self

    def _begin(self) -> None:
        try:
            if os.path.lexists(self.path):
                self._leftover()
            self.path.mkdir(exist_ok=True)
            for lock in self.locks:
                lock.take()
            if os.path.lexists(self.dst):
                raise OutputError(f"{self.dst}: another run has just made it")
            self._go_on_with(self._leftover())
            self._check_statistics()
            self._replace(MARKER, json.dumps({"fingerprint": self.fingerprint}))
        except OSError as error:
            raise OutputError(f"{self.dst}: cannot write beside it: {error}") from error

    def _leftover(self) -> dict[str, str]:
        """The fingerprint of what is there, which must be our own unfinished work or nothing."""
        try:
            if set(os.listdir(self.path)) <= {NAME, f"{MARKER}.tmp"}:
                return {}
            return dict(json.loads((self.path / MARKER).read_text())["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(
                f"{self.path}: is in the way and not unfinished work of qmoe; move it"
            ) from error

    def _go_on_with(self, before: dict[str, str]) -> None:
        """Unfinished work must be on the same thing; with nothing finished it does not matter."""
        if before and before.get("layout") != LAYOUT:
            raise OutputError(
                f"{self.path}: holds unfinished work of another version of qmoe, which this one "
                "cannot go on with; finish it with that version, or remove the folder"
            )
        differing = [k for k, v in self.fingerprint.items() if before.get(k) != v]
        if differing and not self.begun():
            self._empty()
        elif differing:
            now = self.fingerprint
            changes = "; ".join(f"{k} was {before.get(k)}, is {now[k]}" for k in differing)
            raise OutputError(
                f"{self.path}: holds unfinished work that differs ({changes}); repeat that to go "
                "on with it, or remove the folder"
            )

    def _check_statistics(self) -> None:
        """Statistics of an earlier run are in the way, unless this run goes on with it."""
        folder = self.saved
        if folder is None or self.begun():
            return
        if any(path.name != NAME for path in folder.iterdir()):
            raise OutputError(f"{folder}: is not empty; statistics of two runs must not mix")

    def _empty(self) -> None:
        """Remove all but the lock, which is held."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.name != NAME:
                entry.unlink()

    def _release(self) -> None:
        for lock in self.locks:
            lock.release()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.leads:
            try:
                self._end(kind, error)
            finally:
                self._release()

    def _end(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        if kind is None:
            self.solved_cache.clear()
            for copy in self.path.glob(COPY + "*"):
                shutil.rmtree(copy)
            for own in (SELF_TEXT, DISTILLED, NOTE.format("*")):
                for file in self.path.glob(own):
                    file.unlink()
            # In this order: a kill between the two leaves a whole model with one file too many, and
            # not a folder that nothing goes on with.
            self.path.rename(self.dst)
            (self.dst / MARKER).unlink()
            self.locks[0].release(self.dst)
            return
        begun = self.begun()
        # What cannot be read now may be readable later; other refusals would come again.
        resumable = begun and (
            not isinstance(error, QmoeError) or isinstance(error, CheckpointError)
        )
        if not resumable:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            left = "run the same command again to go on" if resumable else "nothing was left behind"
            raise OutputError(f"{self.dst}: the disk is full; {left}") from error
        if isinstance(error, OSError):
            raise OutputError(f"{self.dst}: {error}") from error

    def begun(self) -> bool:
        """Whether any shard or experts are finished, by this run or one that it goes on with."""
        return self.solved_cache.any() or bool(self._notes())

    def unlocked(self) -> list[str]:
        """In words, the folders that nothing keeps a second run out of."""
        return [
            f"{lock.path.parent}: written without a lock, its file system has none"
            for lock in self.locks
            if not lock.works
        ]

    def records(self) -> list[LayerRecord]:
        """What was done to every shard that was quantized, in order."""
        records = filter(None, (note["record"] for note in self._notes().values()))
        return list(map(LayerRecord.from_json, records))

    def digests(self) -> dict[str, str]:
        """Those of all shards, by parameter."""
        each = (note["digests"] for note in self._notes().values())
        return {target: digest for digests in each for target, digest in digests.items()}

    def _notes(self) -> dict[int, dict[str, Any]]:
        """The notes of finished shards, in order."""
        return {i: self.note(i) for i in range(self.shards) if self._note_path(i).exists()}

    def note(self, i: int) -> dict[str, Any]:
        """Of a finished shard: its "record" (None if it has none), "digests" and "sha256"."""
        return dict(json.loads(self._note_path(i).read_text()))

    def _note_path(self, i: int) -> Path:
        return self.path / NOTE.format(i)

    def stored(self) -> dict[str, tuple[str, list[int], int]]:
        """Of every tensor that was written: its torch dtype, shape and bytes."""
        found = {}
        for file in sorted(set(self._weight_map.values())):
            with safe_open(self.path / file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118
                    tensor = shard.get_tensor(name)
                    found[name] = (str(tensor.dtype), list(tensor.shape), tensor.nbytes)
        return found

    def tensors(self, i: int) -> dict[str, Tensor]:
        """Those of a shard that this run has read or written before, mapped from its file."""
        return dict(load_file(self.path / self._file(i)))

    def read_shard(self, i: int) -> dict[str, Tensor]:
        """The tensors of a finished shard; they count as written."""
        path = self.path / self._file(i)
        try:
            if sha256(path) != self.note(i)["sha256"]:
                raise OSError("its checksum does not fit")
            tensors = self.tensors(i)
        except (OSError, SafetensorError) as error:
            raise OutputError(
                f"{self.path}: unfinished work is damaged ({path.name}: {error}); remove it"
            ) from error
        self._count(i, tensors)
        return tensors

    def write_shard(self, shard: Shard) -> None:
        """Write a shard, then its note; either is whole or absent. The solved experts that it was
        made of are not needed any more. Of several processes only the first one writes."""
        if not self.leads:
            return
        file = self._file(shard.index)
        stored = {name: tensor.contiguous() for name, tensor in sorted(shard.tensors.items())}
        write_safetensors(
            self.path / file, stored, {"format": "pt", CONTENT: content_sha256(stored)}
        )
        note = {
            "record": None if shard.record is None else shard.record.to_json(),
            "digests": shard.digests,
            "sha256": sha256(self.path / file),
        }
        self._replace(NOTE.format(shard.index), json.dumps(note))
        self.solved_cache.clear()
        self._count(shard.index, stored)

    def _file(self, i: int) -> str:
        return f"model-{i + 1:05d}-of-{self.shards:05d}.safetensors" if self.shards > 1 else SINGLE

    def _count(self, i: int, tensors: dict[str, Tensor]) -> None:
        self._weight_map |= dict.fromkeys(tensors, self._file(i))
        self._bytes[i] = sum(tensor.nbytes for tensor in tensors.values())

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f"{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(self.path / name)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        write_json(self.path / name, value)

    def write_index(self) -> None:
        if self.shards > 1:
            size, where = (
                {"total_size": sum(self._bytes.values())},
                sorted(self._weight_map.items()),
            )
            self.write_json(INDEX, {"metadata": size, "weight_map": dict(where)})

    def copy_companions(self, source: Path) -> list[str]:
        """Copy every file without weights (checkpoint/folders.py); returns what is left behind, by
        name."""
        files, left = companions(source)
        for file in files:
            (self.path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, self.path / file)
        return left
