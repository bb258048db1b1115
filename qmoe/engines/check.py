"""`check`: whether an engine can run a quantized folder, before hours are spent on serving."""

from importlib import import_module
from pathlib import Path
from typing import Any

from qmoe.checkpoint.headers import find_headers
from qmoe.engines.rule import Engine, Finding, Setup, findings
from qmoe.engines.stored import read_contents
from qmoe.errors import ConfigError

ENGINES = {"vllm": "vllm", "sglang": "sglang", "transformers": "transformers",
           "llama.cpp": "llama_cpp"}  # fmt: skip


def engine(name: str) -> Engine:
    """The rules of an engine by its name. Raises ConfigError for one that is not known, or whose
    rules need a package that is not installed."""
    if name not in ENGINES:
        raise ConfigError(f"engine: expected one of {tuple(ENGINES)}, got {name!r}")
    try:
        found: Engine = import_module(f"qmoe.engines.{ENGINES[name]}").ENGINE
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ConfigError(
            "engine: the rules of llama.cpp need the package `gguf`; pip install 'qmoe[gguf]'"
        ) from error
    return found


def check(
    path: str | Path,
    name: str,
    *,
    tp: int = 1,
    device: str = "cuda",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Which rules of an engine a quantized folder or hub name breaks; config.json and the headers
    of the weights are read, and no weights.

    tp: devices that share every layer. device: "cuda", or "cpu", which vLLM knows. Returns the
    engine, its version, whether all rules are kept ("passes"), what is broken ("broken": for each
    rule what it is about, its sentence, source and remedy, the first name that breaks it, what was
    found there, and how many break it), and what was not looked at ("note"). Raises ConfigError for
    a folder that is not quantized and for options that the engine does not have.
    """
    known = engine(name)
    if tp < 1:
        raise ConfigError(f"tp: expected at least 1, got {tp}")
    if device == "cpu" and name == "sglang":
        raise ConfigError("device: the rules of SGLang are those for NVIDIA GPUs; leave it out")
    with find_headers(path, trust_remote_code) as folder:
        found = findings(known, read_contents(folder), Setup(tp, device))
    return {
        "engine": known.name,
        "version": known.version,
        "passes": not found,
        "broken": [_told(finding) for finding in found],
        "note": known.proves,
    }


def _told(finding: Finding) -> dict[str, Any]:
    rule = finding.rule
    return {
        "about": rule.name,
        "rule": rule.says,
        "source": rule.source,
        "remedy": rule.remedy,
        "name": finding.name,
        "found": finding.found,
        "count": finding.count,
    }
