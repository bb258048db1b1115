"""A process that has imported qmoe and forks for each request: a fresh Python without its imports.

Importing torch and transformers takes several seconds of CPU time, a fork takes milliseconds.

    python -P -W ignore tests/fork_server.py FD

FD is a Unix socket. A request is its length in four bytes, which carry the file descriptors of
standard input, output, error and of a pipe for the process's number and status; then JSON: `code`,
`args`, `cwd`, `env`, `umask`. The new process runs `code` as `python -c` would. What libraries read
from the environment while they are imported is this server's.
"""

import atexit
import gc
import io
import json
import os
import signal
import socket
import struct
import sys
import threading
import traceback
from contextlib import suppress
from typing import Any

import transformers.models.qwen3_moe.modeling_qwen3_moe  # noqa: F401

import qmoe.cli.commands
import qmoe.measure.evaluate
import qmoe.measure.families
import qmoe.packed.load
import qmoe.pipeline.quantize  # noqa: F401


def serve(listening: socket.socket) -> dict[str, Any]:
    """Answer requests until the other side closes; forked processes return their request."""
    while True:
        head, fds, *_ = socket.recv_fds(listening, 4, 4)
        if not head:
            while wait_for_one(0):
                pass
            os._exit(0)  # an ordinary end would take a second to free what was imported
        (size,) = struct.unpack("!I", head)
        request: dict[str, Any] = json.loads(listening.recv(size, socket.MSG_WAITALL))
        if not os.fork():
            listening.close()
            watch(fds[3])
            os.close(fds[3])
            for number, fd in enumerate(fds[:3]):
                os.dup2(fd, number)
                os.close(fd)
            return request
        for fd in fds:
            os.close(fd)
        while wait_for_one(os.WNOHANG):
            pass


def wait_for_one(options: int) -> bool:
    """Reap a child, whose CPU time then counts as this server's; False if there is none."""
    try:
        return os.waitpid(-1, options)[0] != 0
    except ChildProcessError:
        return False


def watch(told: int) -> None:
    """Fork again: the child returns, its parent tells its number and, when it ends, its status."""
    pid = os.fork()
    if not pid:
        return
    os.write(told, struct.pack("!i", pid))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(told, struct.pack("!i", status))
    os._exit(0)


def stream(fd: int, mode: str) -> io.TextIOWrapper:
    """A standard stream as Python makes it under the environment's settings."""
    unbuffered = mode == "w" and bool(os.environ.get("PYTHONUNBUFFERED"))
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "utf-8").partition(":")
    errors = "backslashreplace" if fd == 2 else errors or "strict"
    raw = open(fd, f"{mode}b", 0 if unbuffered else -1, closefd=False)  # noqa: SIM115
    return io.TextIOWrapper(raw, encoding, errors, line_buffering=fd == 2, write_through=unbuffered)


def become(request: dict[str, Any]) -> None:
    """Take on the environment, the streams and the signals of a fresh process."""
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    os.umask(request["umask"])
    sys.stdin = sys.__stdin__ = stream(0, "r")
    sys.stdout = sys.__stdout__ = stream(1, "w")
    sys.stderr = sys.__stderr__ = stream(2, "w")
    # What nohup or a shell's `&` told the tests to ignore, this process is to heed.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["-c", *request["args"]]


def run(code: str) -> int:
    """The status that Python gives such code."""
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def flushed(status: int) -> int:
    """End as Python does, but without the second that freeing all modules takes: exit handlers run,
    and output that cannot be written is an error of its own."""
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: standard output\n{error!r}", file=sys.stderr)
        status = 120
    with suppress(OSError):
        sys.stderr.flush()
    return status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: pytest closes the socket
    gc.collect()
    gc.freeze()  # so that a fork's collections copy no page of what was imported
    asked = serve(socket.socket(fileno=int(sys.argv[1])))
    become(asked)
    os._exit(flushed(run(asked["code"])))
