"""What `qmoe eval` and `qmoe bench` do, and how their results are shown to a person."""

import argparse
from pathlib import Path
from typing import Any

import torch

from qmoe.calibration.text import merged
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.cli import tables
from qmoe.cli.measure_options import STORED
from qmoe.errors import ConfigError
from qmoe.measure.baselines import check_counts
from qmoe.measure.bench import ANSWERED, benchmark
from qmoe.measure.environment import cpu
from qmoe.measure.evaluate import evaluate
from qmoe.measure.extras import Extras
from qmoe.measure.planned import planned
from qmoe.measure.scores import relative
from qmoe.measure.tasks import rows as task_rows
from qmoe.packed.load import Loading
from qmoe.packed.measured import check_can_keep, keep_measured
from qmoe.system.sizes import format_size


def eval(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe eval`."""
    folder = _place(args)
    result = evaluate(
        args.path,
        against=args.against,
        baselines=args.baseline,
        text=merged(args.text or ["heldout"]),
        samples=args.samples,
        seqlen=args.seqlen,
        batch=args.batch,
        loading=_loading(args, None if args.dtype == STORED else getattr(torch, args.dtype)),
        extras=Extras(
            routing=args.save,
            tasks=[name for text in args.tasks or [] for name in text.split(",") if name],
            task_limit=args.task_limit,
            answers=args.answers,
            decision_tokens=args.decision_token or [],
        ),
    )
    if folder is not None:
        settings = {key: getattr(args, key) for key in ("samples", "seqlen", "dtype")}
        keep_measured(folder, "eval", result | {"settings": settings})
    return result


def _place(args: argparse.Namespace) -> Path | None:
    """The folder in which the result is to be kept, checked before the long work; None if it is
    not. The Hub's cache is no place for it."""
    if not args.save:
        return None
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"--save: expected a local folder to write to, got {args.path}")
    check_can_keep(folder)
    return folder


def _loading(args: argparse.Namespace, dtype: torch.dtype | None) -> Loading:
    return Loading(
        dtype,
        args.device,
        args.expert_memory,
        args.trust_remote_code,
        args.activations,
        cache=not args.no_cache,
        plan=args.plan or False,
        kv=args.kv,
    )


def show_eval(result: dict[str, Any]) -> None:
    scores, overall = result["scores"], result["overall"]
    titles = {
        "perplexity": ("perplexity (mean: geometric)", 3),
        "kl": ("KL to the original, nats per token", 5),
        "agreement": ("share of tokens with the same top-1", 4),
    }
    for key, (title, digits) in titles.items():
        if key not in next(iter(overall.values())):
            continue
        rows = tables.scores_rows(scores, key, digits)
        rows.append(["mean", *(f"{m[key]:.{digits}f}" for m in overall.values())])
        tables.show(title, ["domain", *scores], rows)
    if "rtn" in overall and "kl" in overall["rtn"]:
        ratios = [
            [d, *(_ratio(m[d]["kl"], scores["rtn"][d]["kl"]) for m in scores.values())]
            for d in scores["rtn"]
        ]
        ratios.append(["mean", *(_ratio(m["kl"], overall["rtn"]["kl"]) for m in overall.values())])
        tables.show("KL relative to round-to-nearest", ["domain", *scores], ratios)
    if "tails" in result:
        _show_tails(result["tails"], result["decisions"])
    if "acceptance" in result:
        _show_acceptance(result["acceptance"])
    if "answers" in result:
        _show_answers(result["answers"])
    if "tasks" in result:
        header = ["task", *result["tasks"]]
        tables.show("tasks of lm-eval", header, task_rows(result["tasks"]))
    rows = [[name, format_size(n)] for name, n in result["bytes_on_disk"].items()]
    tables.show("weights on disk", ["model", "bytes"], rows)
    for note in [*result["fallbacks"], *result["not_better"]]:
        print(note)


def _show_tails(
    tails: dict[str, dict[str, Any]], decisions: dict[str, dict[str, dict[str, float]]]
) -> None:
    """Percentiles of KL over tokens, its worst tokens, and decision tokens."""
    kinds = {"p95": "95 %", "p99": "99 %", "max": "worst"}
    rows = [
        [domain, *(f"{tail['kl'][domain][kind]:.4f}" for tail in tails.values() for kind in kinds)]
        for domain in next(iter(tails.values()))["kl"]
    ]
    header = [f"{name} {said}" for name in tails for said in kinds.values()]
    tables.show("KL of single tokens: not exceeded by 95 and 99 %, and the worst",
                ["domain", *header], rows)  # fmt: skip
    for name, tail in tails.items():
        for worst in tail["worst"]:
            place = f"{worst['context']!r} -> {worst['token']!r}"
            print(f"{name}: KL {worst['kl']:.3f} in {worst['domain']}: {place}")
    rows = [
        [f"{name}: {token!r}", str(found["places"]), f"{found['original']:.4f}",
         f"{found['probability']:.4f}", f"{found['kl']:.4f}"]
        for name, tokens in decisions.items()
        for token, found in tokens.items()
    ]  # fmt: skip
    if rows:
        header = ["decision token", "places", "probability by the original", "by this model", "KL"]
        tables.show("where the original gives a decision token 1 % or more", header, rows)
    else:
        print("no decision token has a probability of 1 % in the original anywhere in this text")


def _show_acceptance(found: dict[str, dict[str, float]]) -> None:
    """The share of drafts of the prediction layer that the model would accept."""
    rows = [
        [domain, *(f"{of[domain]:.1%}" for of in found.values())]
        for domain in next(iter(found.values()))
    ]
    title = "drafts of the prediction layer that the model accepts (first draft, greedy)"
    tables.show(title, ["domain", *found], rows)
    for name, of in found.items():
        if not of["all"]:
            print(f"{name}: no draft is accepted at all, so its prediction layer is of no use")


def _show_answers(found: dict[str, dict[str, float]]) -> None:
    rows = [
        [
            name,
            f"{a['tokens']:.1f}",
            f"{a['ended']:.0%}",
            f"{a['repeated']:.1%}",
            f"{a['same']:.1f}",
        ]
        for name, a in found.items()
    ]
    header = ["model", "tokens", "ended by themselves", "repetition", "tokens as the original's"]
    tables.show("greedy answers, means", header, rows)


def _ratio(kl: float, to: float) -> str:
    found = relative(kl, to)
    return "-" if found is None else f"{found:.3f}"


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe bench`."""
    if args.threads is not None:
        check_counts(threads=args.threads)
        torch.set_num_threads(args.threads)
    folder = _place(args)
    result = benchmark(
        args.path,
        against=args.against,
        baselines=args.baseline,
        prompt=args.prompt,
        tokens=args.tokens,
        batch=args.batch,
        repeats=args.repeats,
        loading=_loading(args, None),
    )
    if folder is not None:
        keep_measured(folder, "bench", _with_conditions(args, folder, result))
    return result


def _with_conditions(
    args: argparse.Namespace, folder: Path, result: dict[str, Any]
) -> dict[str, Any]:
    """The figures of `qmoe bench` with what they depend on, and what the plan of the model says."""
    keys = ("prompt", "tokens", "batch", "device", "activations", "expert_memory", "plan", "kv")
    settings = {key: getattr(args, key) for key in keys} | {"threads": torch.get_num_threads()}
    processor = cpu()
    found = {
        "models": result,
        "settings": settings,
        "machine": processor["name"]
        + (f", {torch.cuda.get_device_name(args.device)}" if args.device != "cpu" else ""),
        "kernels": processor["kernels"] if args.device == "cpu" else "Triton kernels",
    }
    if args.against is not None and args.device == "cpu":
        original = ModelFolder.find(args.against, args.trust_remote_code)
        found["planned"] = planned(folder, original, ANSWERED)
    return found


def show_bench(result: dict[str, Any]) -> None:
    header = ["model", "prefill tok/s", "first token ms", "decode tok/s", "bytes/token", "weights"]
    if "of_read_bandwidth" in result["qmoe"]:
        header.append("of read bandwidth")
    memory = {"resident_over_bare_process": "resident", "peak_over_bare_process": "peak"}
    memory = {key: title for key, title in memory.items() if key in result["qmoe"]}
    rows = [
        [
            name,
            f"{r['prefill_tokens_per_s']:.0f}",
            f"{r['first_token_ms']:.1f}",
            f"{r['decode_tokens_per_s']:.1f}",
            format_size(r["bytes_per_token"]),
            format_size(r["weights_in_memory"]),
            *([f"{r['of_read_bandwidth']:.0%}"] if "of_read_bandwidth" in r else []),
            *(format_size(r[key]) for key in memory),
        ]
        for name, r in result.items()
    ]
    threads = torch.get_num_threads()
    title = f"medians, models taking turns, {threads} CPU threads"
    tables.show(title, [*header, *memory.values()], rows)
    if memory:
        print("resident and peak: a process of its own, less the same process without a model")
