"""Processes of their own for tests, forked by fork_server.py: streams, signals, limits, modes."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

CLI = "import sys; from qmoe.cli.main import main; sys.exit(main())"


class Process:
    """A forked process, with what tests use of subprocess.Popen."""

    def __init__(self, told: int, out: IO[bytes] | None, err: IO[bytes] | None) -> None:
        self._told, self._out, self._err = told, out, err
        self.pid = self._next()
        self.returncode: int | None = None

    def _next(self) -> int:
        told = os.read(self._told, 4)
        assert told, "the fork server's child ended without a word"
        return int(struct.unpack("!i", told)[0])

    def poll(self) -> int | None:
        """The status of a process that has ended, or None."""
        ready = self.returncode is None and select.select([self._told], [], [], 0)[0]
        return self.wait() if ready else self.returncode

    def wait(self) -> int:
        """The status, once it has ended; the number of a signal is negative."""
        if self.returncode is None:
            self.returncode = self._next()
            os.close(self._told)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self) -> tuple[str, str]:
        """Wait for its end; what it printed, where its streams were not given."""
        self.wait()
        printed = []
        for file in (self._out, self._err):
            if file is not None:
                file.seek(0)
            printed.append("" if file is None else file.read().decode())
        self.close()
        return printed[0], printed[1]

    def close(self) -> None:
        """Forget what it printed."""
        for file in (self._out, self._err):
            if file is not None:
                file.close()
        self._out = self._err = None


class ForkServer:
    """Starts processes that have imported qmoe."""

    def __init__(self) -> None:
        self._ours, theirs = socket.socketpair()
        script = str(Path(__file__).with_name("fork_server.py"))
        command = [sys.executable, "-P", "-W", "ignore", script, str(theirs.fileno())]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(
        self,
        code: str,
        *args: object,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        stdout: Any = None,
        stderr: Any = None,
    ) -> Process:
        """Run code as `python -c CODE ARGS`; what it prints goes to the files or is kept."""
        before = os.umask(0)
        os.umask(before)
        request = {
            "code": code, "args": [*map(str, args)], "umask": before,
            "env": dict(os.environ if env is None else env), "cwd": str(cwd or Path.cwd()),
        }  # fmt: skip
        body = json.dumps(request).encode()
        out = tempfile.TemporaryFile() if stdout is None else None  # noqa: SIM115
        err = tempfile.TemporaryFile() if stderr is None else None  # noqa: SIM115
        told, tells = os.pipe()
        with open(os.devnull, "rb") as nothing:
            files = [nothing, out or stdout, err or stderr, tells]
            fds = [file if isinstance(file, int) else file.fileno() for file in files]
            socket.send_fds(self._ours, [struct.pack("!I", len(body))], fds)
        os.close(tells)
        self._ours.sendall(body)
        return Process(told, out, err)

    def run(self, code: str, *args: object, **streams: Any) -> tuple[int, str, str]:
        """Status, standard output and standard error of a process that has ended."""
        process = self.start(code, *args, **streams)
        out, err = process.communicate()
        return process.wait(), out, err

    def quantize(self, source: Path, out: Path, *options: str, before: str = "") -> Process:
        """A real `qmoe quantize`, after the lines of `before`."""
        return self.start(f"{before}\n{CLI}", "quantize", source, out, *options)

    def close(self) -> None:
        """End the server and those that it started."""
        self._ours.close()
        self._server.wait()
