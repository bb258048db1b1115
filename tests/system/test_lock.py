"""One run to a destination: held by the system's lock, whatever processes are called."""

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import pytest
from helpers import ONE_DOMAIN, slow

import qmoe
from qmoe import CalibrationConfig, QuantConfig
from qmoe.errors import OutputError
from qmoe.pipeline.output import OutputFolder, Shard
from qmoe.system.lock import NAME, Lock

RTN = QuantConfig("rtn")
SLOW = (
    "--preset",
    "fast",
    "--calibration",
    ONE_DOMAIN,
    "--samples",
    "4",
    "--set",
    "calibration.batch=1",
)
# A process 1, as in a container, that rests after each shard.
FIRST = """import os, time; os.getpid = lambda: 1
from qmoe.pipeline.output import OutputFolder
write = OutputFolder.write_shard
OutputFolder.write_shard = lambda *args: (write(*args), time.sleep(60))"""


@pytest.fixture
def running(tmp_path, short, forks):
    """A run into tmp_path/out that calls itself process 1 and has finished a shard."""
    kept = ("--save-statistics", str(tmp_path / "s"))
    process = forks.quantize(short, tmp_path / "out", *SLOW, *kept, before=FIRST)
    while not list((tmp_path / "out.partial").glob(".qmoe-shard-*.json")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


def test_two_processes_of_one_number(running, tmp_path, short, monkeypatch):
    """As two containers on one disk; and one that wants the same folder of statistics."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    said = f"process 1 on {socket.gethostname()} .since 20.* is writing it"
    with pytest.raises(OutputError, match=f"out.partial: {said}"):
        qmoe.quantize(short, tmp_path / "out", RTN, progress=False)
    few = QuantConfig(calibration=CalibrationConfig(ONE_DOMAIN, samples=1, self_samples=0))
    with pytest.raises(OutputError, match=f"s: {said}"):
        qmoe.quantize(
            short, tmp_path / "other", few, save_statistics=tmp_path / "s", progress=False
        )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.partial", "s"]


def test_a_number_that_is_used_again(running, tmp_path, short, forks):
    """After a reboot another process has the number of the one that was killed."""
    running.kill()
    running.communicate()
    lock = tmp_path / "out.partial" / NAME
    note = json.loads(lock.read_text()) | {"pid": os.getppid()}
    lock.write_text(json.dumps(note))
    with pytest.raises(OutputError, match="holds unfinished work that differs"):  # no other process
        qmoe.quantize(short, tmp_path / "out", RTN, progress=False)
    kept = ("--save-statistics", str(tmp_path / "s"))
    process = forks.quantize(short, tmp_path / "out", *SLOW, *kept)
    err = process.communicate()[1]
    assert process.returncode == 0, err
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.startswith(".")]
    assert not (tmp_path / "s" / NAME).exists()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, slow(errno.ENOLCK), slow(errno.ENOSYS)])
def test_a_file_system_without_locks(tmp_path, short, monkeypatch, code):
    """It goes on and says so; after a run that was killed it asks, since it cannot know."""

    def flock(file, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    report = qmoe.quantize(short, tmp_path / "out", RTN, progress=False)
    line = f"{tmp_path / 'out.partial'}: written without a lock, its file system has none"
    assert line in report["fallbacks"]
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), OutputFolder(tmp_path / "out", 2, {"a": "b"}) as folder:
        folder.write_shard(Shard(0, {}, None, {}))
        raise KeyboardInterrupt  # politely: nothing is left that would have to be asked about
    assert not (tmp_path / "out.partial" / NAME).exists()
    lock = tmp_path / "out.partial" / NAME
    lock.write_text(json.dumps({"pid": 7, "host": "there", "since": "then"}))
    with pytest.raises(OutputError, match=rf"process 7 on there \(since then\).*remove {lock}"):
        qmoe.quantize(short, tmp_path / "out", RTN, progress=False)
    lock.unlink()
    with OutputFolder(tmp_path / "out", 2, {"a": "b"}) as folder:
        assert folder.finished == {0}


def test_the_lock_of_a_folder_that_has_gone(tmp_path, monkeypatch):
    """Who had it removed the file, or renamed the folder, between opening and locking."""
    folder, original = tmp_path / "x", fcntl.flock
    folder.mkdir()
    moves = [lambda: (folder / NAME).unlink(), lambda: folder.rename(tmp_path / "y")]

    def flock(file, how):
        if moves:
            moves.pop(0)()
            folder.mkdir(exist_ok=True)
        original(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = Lock(folder)
    lock.take()
    assert not moves and os.path.samestat(os.fstat(lock._file), os.stat(folder / NAME))
    with pytest.raises(OutputError, match=f"process {os.getpid()} on .* is writing it"):
        Lock(folder).take()
    lock.release()
    Lock(folder).take()


def test_a_destination_that_another_run_has_just_made(tmp_path):
    """It was not there when this run was checked."""
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="another run has just made it"):
        OutputFolder(tmp_path / "out", 1, {}).__enter__()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_children_do_not_keep_the_lock(tmp_path):
    """A program that is started while the lock is held does not inherit it."""
    lock = Lock(tmp_path)
    lock.take()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock.release()
    Lock(tmp_path).take()
    child.communicate(b"\n")
