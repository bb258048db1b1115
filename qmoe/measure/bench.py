"""`benchmark`: speed and memory of models here: prefill, first token, decode, resident and peak
bytes.

Models take turns inside every repeat and medians are reported, because clocks drift. Memory is
measured in a process of its own per model, against the same process before the model was loaded.
"""

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.errors import QmoeError
from qmoe.measure.bandwidth import ReadBandwidth
from qmoe.measure.baselines import (
    bytes_on_disk,
    check_baselines,
    check_counts,
    nf4,
    original,
    rounded_to_nearest,
)
from qmoe.measure.compare import check_same_model
from qmoe.model.experts import is_experts
from qmoe.model.hooks import hooked
from qmoe.model.skeleton import build
from qmoe.packed.load import Loading
from qmoe.runtime.modules import packed_stacks
from qmoe.system.progress import progress

KINDS: dict[str, Callable[..., Any]] = {
    "qmoe": lambda folder: Loading(trust_remote_code=folder.trust_remote_code)(folder.path),
    "original": original,
    "nf4": nf4,
}


AS_STORED = Loading()
ANSWERED = 128  # tokens of the prompt that a process answers whose memory is measured


def benchmark(
    path: str | Path,
    *,
    against: str | Path | None = None,
    baselines: Sequence[str] = (),
    prompt: int = 256,
    tokens: int = 32,
    batch: int = 1,
    repeats: int = 5,
    loading: Loading = AS_STORED,
) -> dict[str, dict[str, float]]:
    """Speed and memory of a quantized folder beside the original and baselines, by model name.

    See `speed` and `memory` for the figures and their units. Resident and peak memory are those of
    a CPU process, so only measured there.
    """
    check_baselines(baselines, against)
    check_counts(prompt=prompt, tokens=tokens, batch=batch, repeats=repeats)
    folder = ModelFolder.find(path, loading.trust_remote_code)
    source = None if against is None else ModelFolder.find(against, loading.trust_remote_code)
    if source is not None:
        check_same_model(folder.path, source)
    models = {"qmoe": loading(folder.path)}
    measured = [("qmoe", "qmoe", folder)]
    used = {}
    with ExitStack() as stack:
        if source is not None:
            models["original"] = original(source).to(loading.device)
            measured.append(("original", "original", source))
            if "nf4" in baselines:
                models["nf4"] = nf4(source, device=loading.device)
                measured.append(("nf4", "nf4", source))
            if "rtn" in baselines:
                twin = stack.enter_context(rounded_to_nearest(folder.path, source))
                models["rtn"] = loading(twin.path)
                measured.append(("rtn", "qmoe", twin))
        if loading.device == "cpu":
            for name, kind, place in progress(measured, "measuring memory"):
                used[name] = memory(kind, place)
    timed = speed(models, prompt=prompt, tokens=tokens, batch=batch, repeats=repeats)
    for name, figures in timed.items():
        figures["weights_in_memory"] = weights_in_memory(models[name])
        if name not in used:
            continue
        m = used[name]
        figures["resident_over_bare_process"] = m["loaded"] - m["without_model"]
        figures["peak_over_bare_process"] = m["peak"] - m["without_model"]
    timed["qmoe"]["bytes_on_disk"] = bytes_on_disk(folder.path)
    return timed


def speed(
    models: dict[str, Any], *, prompt: int, tokens: int, batch: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Median prefill and decode tokens/s, first-token latency in ms, bytes of weights that a token
    of one sequence reads, and on a CPU at which share of the memory's read bandwidth.

    prompt: tokens of a (random) sequence; tokens: tokens decoded after it, greedily; batch: of so
    many sequences at once.
    """
    memory = None
    if all(model.device.type == "cpu" for model in models.values()):
        memory = ReadBandwidth()
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for i in progress(range(repeats + 1), "timing"):
        if memory is not None:
            memory.measure()
        for name, model in models.items():
            measured = _run(model, prompt, tokens, batch)
            if i:  # the first round warms up
                timings[name].append(measured)
    found: dict[str, dict[str, float]] = {}
    for name, runs in timings.items():
        first, rest = (median(part) for part in zip(*runs, strict=True))
        read = bytes_per_token(models[name])
        found[name] = {
            "prefill_tokens_per_s": batch * prompt / first,
            "first_token_ms": 1e3 * first,
            "decode_tokens_per_s": batch * tokens / rest,
            "bytes_per_token": read,
        }
        if memory is not None and batch == 1:
            found[name]["read_bandwidth"] = memory.best
            found[name]["of_read_bandwidth"] = read * tokens / rest / memory.best
    return found


@torch.no_grad()
def _run(model: Any, prompt: int, tokens: int, batch: int = 1) -> tuple[float, float]:
    """Seconds until the first token, and for `tokens` more."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (batch, prompt), generator=generator).to(model.device)
    synchronize(model.device)
    start = time.perf_counter()
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    ids = out.logits[:, -1:].argmax(-1)
    synchronize(model.device)
    first = time.perf_counter()
    for _ in range(tokens):
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
        ids = out.logits[:, -1:].argmax(-1)
    synchronize(model.device)
    return first - start, time.perf_counter() - first


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was told, so that a clock means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def bytes_per_token(model: Any) -> int:
    """Weight bytes one decoded token reads: its experts' share of each stack, all else whole but
    the input embedding (one row) unless it is tied to the output."""
    active: dict[str, int] = {}
    hooks = [
        (m, lambda m, args, n=name: active.update({n: args[1].shape[-1]}))
        for name, m in model.named_modules()
        if is_experts(m)
    ]
    with hooked(hooks):
        model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    table = model.get_input_embeddings().weight
    tied = (
        model.get_output_embeddings() is not None and model.get_output_embeddings().weight is table
    )
    stacks = dict(packed_stacks(model))
    total = 0.0
    for name, module in model.named_modules():
        share = 1.0
        owner = name.rpartition(".")[0]
        if name in active or owner in active:
            experts = model.get_submodule(name if name in active else owner)
            share = active[name if name in active else owner] / experts.num_experts
        if name in stacks:
            total += share * stacks[name].nbytes()
        for parameter in module.parameters(recurse=False):
            if parameter is not table or (tied and module is model.get_output_embeddings()):
                total += share * parameter.nbytes
    return int(total)


def weights_in_memory(model: Any) -> int:
    """Bytes of all weights of a loaded model, packed or not; shared ones once."""
    total: dict[int, int] = {id(p): p.nbytes for p in model.parameters()}
    return sum(total.values()) + sum(int(stack.nbytes()) for _, stack in packed_stacks(model))


def memory(kind: str, folder: ModelFolder) -> dict[str, int]:
    """Resident bytes of a fresh process before and after loading a model, and its peak while the
    model answers a prompt of 128 tokens. Raises QmoeError if the process fails."""
    call = f"report_memory({kind!r}, {str(folder.path)!r}, {folder.trust_remote_code})"
    code = f"from qmoe.measure.bench import report_memory; {call}"
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise QmoeError(
            f"measuring the memory of {folder.path} failed:\n{done.stderr.strip()[-2000:]}"
        )
    result: dict[str, int] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def report_memory(kind: str, path: str, trust_remote_code: bool) -> None:
    """Runs in the process that `memory` starts; prints JSON."""
    process, folder = psutil.Process(), ModelFolder(Path(path), trust_remote_code)
    # Thread pools, the model's code and its skeleton without data are part of a process without a
    # model: have them before the first reading.
    torch.ones(64, 64).bfloat16() @ torch.ones(64, 64).bfloat16()
    build(folder.config(), torch.bfloat16)
    gc.collect()
    before = process.memory_info().rss
    model = KINDS[kind](folder)
    gc.collect()
    loaded = process.memory_info().rss
    _run(model, ANSWERED, 1)
    peak = _peak()
    print(json.dumps({"without_model": before, "loaded": loaded, "peak": peak}))


def _peak() -> int:
    """Largest resident size of this process so far, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)
