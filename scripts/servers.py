"""A server in a process of its own, asked over HTTP, for bench_vllm.py and bench_serve.py."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil

START = 1800  # seconds that a server may take to start


@dataclass(frozen=True)
class Server:
    """A running server: its address and its process."""

    url: str
    process: psutil.Process

    def ask(self, path: str, body: Mapping[str, Any]) -> Iterator[Any]:
        """What is answered to a POST: one JSON value, or those of a stream as they come."""
        request = Request(
            f"{self.url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urlopen(request, timeout=START) as answer:
            for line in answer:
                text = line.decode().removeprefix("data: ").strip()
                if text and text != "[DONE]":
                    yield json.loads(text)

    def memory(self) -> int:
        """Bytes that its largest process, the one with the weights, has for itself."""
        everyone = [self.process, *self.process.children(recursive=True)]
        return max(int(one.memory_full_info().uss) for one in everyone)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]
) -> Iterator[Server]:
    """The server that a command starts on a port of this machine, until the block ends."""
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(url, child, log)
        yield Server(url, psutil.Process(child.pid))
    finally:
        everyone = psutil.Process(child.pid).children(recursive=True)
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            child.kill()
        for one in psutil.wait_procs(everyone, timeout=30)[1]:
            one.kill()


def _wait(url: str, child: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START
    while time.monotonic() < end:
        if child.poll() is not None:
            sys.exit(f"the server ended; its last lines are in {log}")
        try:
            urlopen(f"{url}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    sys.exit(f"the server did not start within {START} s; see {log}")


def at_once(stream: Callable[[Any], Any], prompts: Sequence[Any]) -> list[Any]:
    """What several clients get at the same time."""
    with ThreadPoolExecutor(len(prompts)) as pool:
        return list(pool.map(stream, prompts))


def rate(stream: Callable[[Any], Any], prompts: Sequence[Any], tokens: int) -> float:
    """Generated tokens per second of several clients at the same time, each of which gets
    `tokens`."""
    start = time.perf_counter()
    at_once(stream, prompts)
    return tokens * len(prompts) / (time.perf_counter() - start)
