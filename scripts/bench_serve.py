"""`transformers serve` with and without qmoe: text, memory and speed of a real server, over HTTP.

    python -P scripts/bench_serve.py --work DIR
    python -P scripts/bench_serve.py --work DIR --out docs/engines.md    # and puts it into a page

It needs transformers' packages for serving (`pip install qmoe[serve]`). Models are quantized to
nearest and served on a CPU: the demo model, whose text must be that of `qmoe.load`, in one piece,
as a stream, and for two clients at once; and a random model that is large enough to see its
weights, for memory and speed.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

import qmoe

HERE = Path(__file__).resolve().parent
DEMO = HERE.parent / "tests" / "data" / "demo-moe"
sys.path.insert(0, str(HERE))  # `python -P` leaves it out
from servers import Server, at_once, free_port, rate, serving  # noqa: E402

BEGIN, END = "<!-- serve: begin, by scripts/bench_serve.py -->", "<!-- serve: end -->"
SHAPE = {"hidden": 1024, "experts": 64, "intermediate": 512, "layers": 4}
TOKENS, STREAMS, REPEATS = 64, 8, 4
PROMPTS = [f"It was the year {1800 + 13 * i}, and" for i in range(STREAMS)]
PLAIN, OURS = "transformers.cli.transformers", "qmoe.cli.transformers"
SIXTEEN = "`transformers serve`, the 16-bit original"
SERVERS: dict[str, tuple[str, Sequence[str]]] = {
    "`qmoe-transformers serve`": (OURS, ()),
    # On a CPU its cache takes most of the free memory unless it is told how many blocks to take.
    "`qmoe-transformers serve --continuous-batching --cb-num-blocks 64`": (
        OURS,
        ("--continuous-batching", "--cb-num-blocks", "64"),
    ),
    "`transformers serve`, without qmoe": (PLAIN, ()),
    SIXTEEN: (PLAIN, ()),
}


def models(work: Path) -> dict[str, Path]:
    """The folders that are served; those that are missing in `work` are made."""
    made = {name: work / name for name in ("server-16", "server-4", "demo-4")}
    if not made["server-16"].is_dir():
        script = [sys.executable, "-P", str(HERE / "random_model.py"), str(made["server-16"])]
        shape = [part for name, size in SHAPE.items() for part in (f"--{name}", str(size))]
        subprocess.run([*script, *shape], check=True)
    for source, target in ((made["server-16"], "server-4"), (DEMO, "demo-4")):
        if not made[target].is_dir():
            qmoe.quantize(source, made[target], qmoe.QuantConfig("rtn"))
    return made | {"demo-16": DEMO}


@torch.no_grad()
def expected(folder: Path, prompts: Sequence[str], tokens: int) -> list[str]:
    """Greedy text that `qmoe.load` gives."""
    model, tokenizer = qmoe.load(folder)
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


def complete(server: Server, model: str, prompt: str, tokens: int, stream: bool) -> str:
    """Greedy text after a prompt."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": stream,
    }  # fmt: skip
    answers = list(server.ask("/v1/completions", body))
    if stream != (len(answers) > 1) or (used := answers[-1]["usage"]["completion_tokens"]) < tokens:
        raise AssertionError(f"expected {tokens} tokens, found {used} in {len(answers)} answers")
    return "".join(choice["text"] for one in answers for choice in one["choices"])


@contextmanager
def serve(folder: Path, module: str, options: Sequence[str], log: Path) -> Iterator[Server]:
    """transformers' server for a folder, until the block ends."""
    port = free_port()
    command = [
        sys.executable, "-P", "-m", module, "serve", str(folder), "--port", str(port), "--host",
        "127.0.0.1", "--device", "cpu", *options,
    ]  # fmt: skip
    with serving(command, port, log, {}) as server:
        yield server


def texts(folder: Path, module: str, options: Sequence[str], log: Path) -> list[str]:
    """What a server says after two prompts: alone, as a stream and at once, always the same."""
    with serve(folder, module, options, log) as server:
        ask = partial(complete, server, str(folder), tokens=16)
        alone = [ask(prompt, stream=False) for prompt in PROMPTS[:2]]
        streamed = [ask(prompt, stream=True) for prompt in PROMPTS[:2]]
        both = at_once(partial(ask, stream=True), PROMPTS[:2])
    if not alone == streamed == both:
        raise AssertionError(f"expected the same texts, found {alone}, {streamed}, {both}")
    return alone


def measured(
    folder: Path, module: str, options: Sequence[str], log: Path
) -> tuple[int, list[float]]:
    """Bytes that a server takes, and tokens per second for one client and for several."""
    with serve(folder, module, options, log) as server:
        long = partial(complete, server, str(folder), tokens=TOKENS, stream=True)
        # The best of several: another program may have had the cores.
        rates = [max(rate(long, PROMPTS[:n], TOKENS) for _ in range(REPEATS)) for n in (1, STREAMS)]
        return server.memory(), rates


def table(work: Path) -> list[str]:
    made = models(work)
    ours = expected(made["demo-4"], PROMPTS[:2], 16)
    lines = [
        f"| Qwen3-MoE of {SHAPE['layers']} layers, hidden {SHAPE['hidden']}, {SHAPE['experts']} "
        f"experts of {SHAPE['intermediate']} | on disk | memory of the server | tok/s, 1 request | "
        f"tok/s, {STREAMS} at once | text of the demo model |",
        "|---|---|---|---|---|---|",
    ]
    for i, (what, (module, options)) in enumerate(SERVERS.items()):
        bits = "16" if what == SIXTEEN else "4"
        said = texts(made[f"demo-{bits}"], module, options, work / f"serve-{i}-demo.log")
        if module == OURS and said != ours:
            raise AssertionError(f"expected {ours}, found {said}")
        told = "that of `qmoe.load`" if said == ours else "another"
        folder = made[f"server-{bits}"]
        used, rates = measured(folder, module, options, work / f"serve-{i}.log")
        disk = sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e9
        cells = [what, f"{disk:.2f} GB", f"{used / 1e9:.2f} GB", *(f"{r:.1f}" for r in rates), told]
        lines.append(f"| {' | '.join(cells)} |")
        print(lines[-1], said, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="the page that the table goes into")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    lines = table(args.work.absolute())
    print("\n".join(lines))
    if args.out is not None:
        page = args.out.read_text()
        start, stop = page.index(BEGIN) + len(BEGIN), page.index(END)
        made = "\n".join(lines)
        args.out.write_text(f"{page[:start]}\n{made}\n{page[stop:]}")


if __name__ == "__main__":
    main()
