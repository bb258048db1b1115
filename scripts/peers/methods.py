"""The methods that are compared, and how each one's process is started.

Ours run through the command line in this environment, peers through `<script>.py` in theirs. All
quantize attention's q, k, v, o and every routed expert's matrices, in groups of 128 where a method
has groups, and leave embeddings, head, routers and norms alone.
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from environments import HERE, python_of

BITS = (2, 3, 4)
DISTILLED = ("--set", "distill=100")
OURS = ("ours", "exl3_recipe")  # scripts that take the options of `qmoe quantize`
# llama.cpp's types by the number in their name; what they store is more (see bits_per_weight).
GGUF = {2: ("Q2_K", "IQ2_S"), 3: ("Q3_K_M", "IQ3_S"), 4: ("Q4_0", "Q4_K_M", "IQ4_XS")}


@dataclass(frozen=True)
class Method:
    """One line of the comparison. script: in this folder; its stem names the environment.
    calibrated: whether its result depends on the calibration text. writes: whether it takes other
    samples of that text than the peers, and text that the model writes itself."""

    name: str
    script: str
    options: tuple[str, ...] = ()
    bits: tuple[int, ...] = BITS
    calibrated: bool = True
    writes: bool = False


@dataclass(frozen=True)
class Task:
    """What a method is to do: a model folder, bits, calibration text as files and as tokens."""

    model: Path
    bits: int
    text: str
    tokens: Path
    seed: int


def _ours(name: str, *options: str, calibrated: bool = True) -> Method:
    return Method(name, "ours", options, calibrated=calibrated)


def _presets() -> list[Method]:
    """As they are, and with a phase that distils the finished model."""
    names = ("balanced", "best")
    plain = [Method(name, "ours", ("--preset", name), writes=True) for name in names]
    return [*plain, *(replace(m, name=f"{m.name} distilled", options=(*m.options, *DISTILLED))
                      for m in plain)]  # fmt: skip


def _exl3() -> list[Method]:
    """In EXL3's codes: ours, and EXL3's own recipe."""
    coded = ("--format", "exl3")
    recipe = {
        "routing_weighted": "false", "damp": "0.025", "beam": "1024",
        # Borrowing this many, every expert's Hessian is that of all tokens of the layer.
        "min_tokens": "1000000000",
    }  # fmt: skip
    settings = [part for name, value in recipe.items() for part in ("--set", f"{name}={value}")]
    return [
        *(Method(f"{preset} exl3", "ours", ("--preset", preset, *coded), writes=True)
          for preset in ("balanced", "best")),
        Method("exl3's recipe", "exl3_recipe", ("--preset", "fast", *coded, *settings)),
    ]  # fmt: skip


def _variants() -> list[Method]:
    """`balanced` without one of its pieces each, rotated, with ten times its text."""
    given_text = ("--self-samples", "0", "--samples", "128")
    changes = {
        "without refit": ("--set", "refit=false"),
        "without grid search": ("--set", "search_grid=false"),
        "without self-samples": given_text,
        "without routing weights": ("--set", "routing_weighted=false"),
        "without borrowing": ("--set", "min_tokens=0"),
        "without self-samples and borrowing": (*given_text, "--set", "min_tokens=0"),
        # As many borrowed tokens as there are: every expert's Hessian is mostly the layer's.
        "without self-samples, borrowing all": (*given_text, "--set", "min_tokens=32768"),
        "rotated at run time": ("--rotate", "online"),
        "with a fused rotation": ("--rotate", "fused"),
        "with ten times the text": ("--self-samples", "640", "--samples", "640"),
    }
    return [
        Method(f"balanced {what}", "ours", ("--preset", "balanced", *options), (2,),
               writes="without self-samples" not in what)
        for what, options in changes.items()
    ]  # fmt: skip


def _gguf() -> list[Method]:
    return [
        Method(f"llama.cpp {kind}", "llama_cpp", ("--type", kind), (bits,))
        for bits, kinds in GGUF.items()
        for kind in kinds
    ]


METHODS = [
    _ours("rtn", "--method", "rtn", calibrated=False),
    _ours(
        "gptq-plain",
        *("--preset", "fast", "--set", "act_order=false", "--set", "routing_weighted=false"),
    ),
    _ours("gptq", "--preset", "fast"),
    *_presets(),
    *_exl3(),
    *_variants(),
    Method("autoround-50", "autoround", ("--iterations", "50")),
    Method("autoround-200", "autoround", ("--iterations", "200")),
    Method("llm-compressor gptq", "llm_compressor", ("--method", "gptq")),
    Method("llm-compressor gptq asym", "llm_compressor", ("--method", "gptq", "--asymmetric")),
    *_gguf(),
    Method("gptqmodel", "gptq_model"),
    Method("llm-compressor awq", "llm_compressor", ("--method", "awq", "--asymmetric")),
    Method("bitsandbytes nf4", "nf4", bits=(4,), calibrated=False),
]


@cache
def _help() -> str:
    command = [sys.executable, "-P", "-m", "qmoe", "quantize", "--help"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def missing(method: Method) -> str | None:
    """Why a method cannot be run here at all, in words; None if it can."""
    if "--preset" in method.options and "--preset" not in _help():
        return "this qmoe has no option --preset"
    if not (HERE / f"{method.script}.py").is_file():
        return f"scripts/peers/{method.script}.py is not there"
    return None


def run(method: Method, task: Task, out: Path, work: Path, log: Path) -> str | None:
    """Quantize into `out`. Returns None, or the last words of a process that failed."""
    python = python_of(method.script, work)
    command = [str(python), "-P", str(HERE / f"{method.script}.py")]
    if method.script in OURS:
        command += [str(task.model), str(out), *_scheme(method, task.bits)]
        command += method.options
        if method.calibrated:
            command += ["--calibration", task.text, "--seqlen", "256"]
            command += ["--set", f"calibration.seed={task.seed}"]
    else:
        command += [str(task.model), str(task.tokens), str(out), "--bits", str(task.bits)]
        command += method.options
    with log.open("w") as file:
        env = dict(os.environ)
        if python != Path(sys.executable):
            env.pop("PYTHONPATH", None)  # of this environment, not of the peer's
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=env)
    if done.returncode == 0 and (out / "peer.json").is_file():
        return None
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"exit status {done.returncode}: {lines[-1][:300] if lines else 'no output'}"


def _scheme(method: Method, bits: int) -> list[str]:
    if "exl3" in method.options:
        return ["--bits", str(bits), "--dense-bits", str(bits)]
    return ["--bits", str(bits), "--asymmetric", "--dense-bits", str(bits),
            "--set", "dense.group_size=128", "--set", "dense.symmetric=false"]  # fmt: skip
