"""The words of a model card: what is in the folder, how good it is, how to run it and how it was
made."""

import math
import shlex
from typing import Any

from qmoe.config import CHANNEL, UNIFORM_LAYERS, QuantConfig, Scheme
from qmoe.config.command import arguments
from qmoe.system.sizes import format_size


def body(report: dict[str, Any], original: dict[str, Any], measured: dict[str, Any]) -> str:
    """All that qmoe says in a card, in Markdown. original: the metadata of the original's card.
    measured: what `qmoe eval --save` and `qmoe bench --save` found, by command."""
    config = QuantConfig.from_dict(report["config"])
    parts = [
        f"# {title(report)}",
        _what(report, config, original),
        _parts(report, config),
        f"## Quality\n\n{_quality(report, measured)}",
        *_speed(measured),
        f"## How to run it\n\n{_how_to_run(report)}",
        f"## How it was made\n\n{_how_made(report, config)}",
    ]
    return "\n\n".join(parts)


def title(report: dict[str, Any]) -> str:
    """A name for the quantized model, as in Qwen3-30B-A3B-int4."""
    bits = report["config"]["experts"]["bits"]
    return f"{source_name(report).rpartition('/')[2]}-int{bits}"


def source_name(report: dict[str, Any]) -> str:
    """The original's name: on the Hub, or that of its folder."""
    name = report.get("source", {}).get("name")
    return str(name or report.get("model_type") or "model")


def _what(report: dict[str, Any], config: QuantConfig, original: dict[str, Any]) -> str:
    name, revision = source_name(report), report.get("source", {}).get("revision")
    base = f"`{name}`"
    if revision:
        base = f"[{name}](https://huggingface.co/{name}) (revision `{str(revision)[:12]}`)"
    now = format_size(sum(report["bytes"].values()))
    said = (
        f"This is {base}, a Mixture-of-Experts language model ({report['model_type']}), with "
        f"routed experts quantized to {config.experts.bits} bits by qmoe "
        f"{report['qmoe_version']}. Its weights take {now} instead of "
        f"{format_size(report['source_bytes'])}."
    )
    if not revision:
        said += (
            " The original was a local folder, so the metadata of this card names no `base_model`; "
            "add it before you publish the model."
        )
    license = original.get("license_name") or original.get("license")
    if license:
        return f"{said}\n\nThe license of the original applies: {license}."
    return f"{said}\n\nThe original's card names no license; its terms apply to this model too."


def describe(scheme: Scheme | None) -> str:
    """How a part is stored, in words."""
    if scheme is None:
        return "as in the original"
    kind = "symmetric" if scheme.symmetric else "with zero points"
    groups = (
        "one scale per output channel"
        if scheme.group_size == CHANNEL
        else f"groups of {scheme.group_size}"
    )
    return f"{scheme.bits} bits, {groups}, {kind}"


def _parts(report: dict[str, Any], config: QuantConfig) -> str:
    nbytes = report["bytes"]
    experts, dense = (
        sum(n for kind, n in nbytes.items() if kind.startswith(f"{tier} "))
        for tier in ("experts", "dense")
    )
    rest = sum(nbytes.values()) - experts - dense
    rows = [
        ["routed experts", describe(config.experts), format_size(experts)],
        ["attention, shared experts, other linears", describe(config.dense), format_size(dense)],
        ["routers, embeddings, norms, all else", describe(None), format_size(rest)],
    ]
    if config.lm_head is not None:
        rows.insert(2, ["lm_head", describe(config.lm_head), "counted above"])
    return table(["part", "stored as", "bytes"], rows)


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


NAMES = {
    "original": "original",
    "rtn": "round-to-nearest, same bits",
    "nf4": "bitsandbytes NF4",
    "qmoe": "this model",
}


def number(value: float | None, digits: int) -> str:
    """A score; infinite ones are null in JSON."""
    return "infinite" if value is None or math.isinf(value) else f"{value:.{digits}f}"


def _quality(report: dict[str, Any], measured: dict[str, Any]) -> str:
    found = measured.get("eval")
    if not found:
        return (
            "No comparison with the original is recorded. This command makes one and adds it here:"
            f"\n\n    qmoe eval {title(report)} --against {source_name(report)} --save"
        )
    compared = "kl" in found["overall"]["qmoe"]
    header = ["model", "perplexity", *(["KL, nats per token", "same first choice"] * compared)]
    rows = []
    for key, name in NAMES.items():
        if (m := found["overall"].get(key)) is None:
            continue
        rows.append([name, number(m["perplexity"], 3)])
        if compared:
            rows[-1] += [number(m["kl"], 5), f"{100 * m['agreement']:.1f} %"]
    domains = ", ".join(found["scores"]["qmoe"])
    given = found["settings"]
    return (
        f"Means over {len(found['scores']['qmoe'])} domains of text ({domains}), "
        f"{given['samples']} samples of {given['seqlen']} tokens each, activations in "
        f"{given['dtype']}. KL is the divergence from the original's predictions.\n\n"
        + "\n\n".join([table(header, rows), *behind_the_mean(found)])
    )


def behind_the_mean(found: dict[str, Any]) -> list[str]:
    """What `qmoe eval` found of single tokens, decision tokens and greedy answers, as sentences on
    the quantized model; none for what was not measured."""
    said = []
    if tail := found.get("tails", {}).get("qmoe"):
        kl = tail["kl"]["all"]
        said.append(
            f"99 % of the tokens have a KL of {number(kl['p99'], 4)} or less, 95 % of "
            f"{number(kl['p95'], 4)}; the largest is {number(kl['max'], 3)}."
        )
    for token, at in found.get("decisions", {}).get("qmoe", {}).items():
        said.append(
            f"Where the original gives `{token}` a probability of 1 % or more ({at['places']} "
            f"places), the mean is {at['original']:.3f}, and this model's {at['probability']:.3f}."
        )
    if (answers := found.get("answers")) and "original" in answers:
        ours, theirs = answers["qmoe"], answers["original"]
        said.append(
            f"Its greedy answers to a few prompts have {ours['tokens']:.0f} tokens in the mean "
            f"(the original's {theirs['tokens']:.0f}), {100 * ours['ended']:.0f} % of them end by "
            f"themselves ({100 * theirs['ended']:.0f} %), and {100 * ours['repeated']:.1f} % is "
            f"repetition ({100 * theirs['repeated']:.1f} %)."
        )
    return said


def _speed(measured: dict[str, Any]) -> list[str]:
    found = measured.get("bench")
    if not found:
        return []
    header = ["model", "prompt tok/s", "decoding tok/s", "weights in memory"]
    rows = [
        [
            NAMES[key],
            f"{found['models'][key]['prefill_tokens_per_s']:.0f}",
            f"{found['models'][key]['decode_tokens_per_s']:.1f}",
            format_size(found["models"][key]["weights_in_memory"]),
        ]
        for key in NAMES
        if key in found["models"]
    ]
    given = found["settings"]
    device = "a CPU" if given["device"] == "cpu" else f"a GPU ({given['device']})"
    threads = "1 CPU thread" if given["threads"] == 1 else f"{given['threads']} CPU threads"
    said = (
        f"A prompt of {given['prompt']} tokens and {given['tokens']} tokens decoded after it, with "
        f"batch size {given['batch']}, on {device}: {found['machine']}, {threads}, "
        f"{found['kernels']}."
    )
    return [f"## Speed\n\n{said}\n\n{table(header, rows)}"]


QMOE = """\
**qmoe** keeps the weights packed, on a CPU or an NVIDIA GPU:

```python
import qmoe

model, tokenizer = qmoe.load("{name}")  # device="cuda" on a GPU
ids = tokenizer("The capital of France is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))
```"""
TRANSFORMERS = """\
**transformers** with the package `compressed-tensors` loads it too, and expands the experts to
16 bits in memory:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
VLLM = """\
**vLLM** reads symmetric checkpoints in this format, for families and shapes that its kernels
support. qmoe's tests do not load this model there:

    vllm serve {name}"""
ONLY_QMOE = """\
**transformers and vLLM** cannot run it by themselves: it has {what}. After `import qmoe`,
transformers can."""
LLAMA_CPP = """\
**llama.cpp** reads GGUF files, which qmoe makes of this folder for families that llama.cpp knows:

    qmoe export {name} --to gguf"""
EXLLAMA = """\
**exllamav3** has the same format and runs it on GPUs. qmoe's tests do not load this model there."""


def _how_to_run(report: dict[str, Any]) -> str:
    what = _only_in_qmoe(report)
    if report["config"].get("format") == "exl3":
        parts = [QMOE, EXLLAMA]
    else:
        parts = [QMOE, *([TRANSFORMERS, VLLM] if what is None else [ONLY_QMOE]), LLAMA_CPP]
    return "\n\n".join(part.format(name=title(report), what=what) for part in parts)


def _only_in_qmoe(report: dict[str, Any]) -> str | None:
    """What of a folder of integers no other program runs; None if there is nothing."""
    config = report["config"]
    if report["rotated"]:
        return "weights that are rotated at run time"
    if not report["symmetric"]:
        return "zero points"
    # One digit for each expert of a stack, and one for a linear.
    mixed = any(len(digits) > 1 for digits in config.get("widths", {}).values())
    alone = mixed and config.get("target") not in UNIFORM_LAYERS
    return "experts of different bits" if alone else None


def command(report: dict[str, Any]) -> str:
    """The command that makes the model again, for a shell."""
    config = QuantConfig.from_dict(report["config"])
    made = ["qmoe", "quantize", source_name(report), title(report), *arguments(config)]
    if statistics := report.get("calibration", {}).get("statistics"):
        made += ["--statistics", *map(str, statistics)]
    return shlex.join(made)


def _how_made(report: dict[str, Any], config: QuantConfig) -> str:
    text = report.get("calibration", {})
    said = f"The method is {config.method}"
    if samples := text.get("samples"):
        own = text.get("self_samples", 0)
        said += f", on {samples[0]} samples of {samples[1]} tokens"
        said += f", {own} of which the model generated itself" if own else ""
    fallbacks = len(report["fallbacks"])
    return (
        f"{said}. This command makes the same weights again:\n\n    {command(report)}\n\n"
        f"`qmoe_report.json` holds the error of every expert, and says where the run departed from "
        f"its settings ({fallbacks} {'entry' if fallbacks == 1 else 'entries'} under `fallbacks`)."
        " `qmoe inspect` checks every byte, and `qmoe report` shows all of it as a page."
    )
