"""One writer to a folder: a lock that the system lets go when its process ends, however it ends.

A process number says nothing of who holds it: numbers are used again after a reboot, and in every
container there is a process 1. It is noted only to say who is writing.
"""

import errno
import fcntl
import json
import os
import socket
from datetime import datetime
from pathlib import Path

from qmoe.errors import OutputError

NAME = ".qmoe-lock"
HELD = (errno.EWOULDBLOCK, errno.EACCES)


class Lock:
    """The lock of a folder. works: whether its file system has locks; where it has none, nothing
    keeps a second writer out that begins at the same moment, but one that finds the first's note is
    refused."""

    def __init__(self, folder: Path):
        self.path, self.works = folder / NAME, True
        self._file: int | None = None

    def take(self) -> None:
        """Raises OutputError if another process has it, OSError if there can be none."""
        while self._file is None:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                self._hold(file)
                # Who had it may have removed it, or renamed the folder, after it was opened here.
                if self._is_there(file):
                    self._file = file
            finally:
                if self._file is None:
                    os.close(file)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(note).encode(), 0)

    def _hold(self, file: int) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            who = _read(file)
            if error.errno in HELD:
                raise OutputError(
                    f"{self.path.parent}: {who or 'another process'} is writing it; wait, or end "
                    "that first"
                ) from error
            self.works = False
            if who:
                raise OutputError(
                    f"{self.path.parent}: {who} was writing it, and this file system has no locks "
                    f"that would tell whether it still is ({error}); if not, remove {self.path}"
                ) from error

    def _is_there(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self, folder: Path | None = None) -> None:
        """Let go, if it is held. folder: where the locked one is now, if it was renamed."""
        if self._file is not None:
            ((folder or self.path.parent) / NAME).unlink(missing_ok=True)
            os.close(self._file)
            self._file = None


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")


def _read(file: int) -> str:
    """Who noted that they hold it, in words."""
    try:
        note = json.loads(os.pread(file, 4096, 0))
        return f"process {note['pid']} on {note['host']} (since {note['since']})"
    except (OSError, ValueError, LookupError, TypeError):
        return ""
