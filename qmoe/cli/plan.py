"""What `qmoe plan` does, and how its result is shown to a person."""

import argparse
import shlex
from pathlib import Path
from typing import Any

import torch

from qmoe.checkpoint.headers import find_headers
from qmoe.cli import tables
from qmoe.cli.settings import as_options, config_from, given
from qmoe.fused.int8_cache import to_int8
from qmoe.model.source import open_source
from qmoe.plan.choose import AT_ONCE, Candidate, describe, measure, schemes
from qmoe.plan.choose import plan as choose
from qmoe.plan.placement import Budget
from qmoe.plan.run_plan import RunPlan
from qmoe.prediction.attach import add_prediction
from qmoe.system.host_memory import room
from qmoe.system.sizes import format_size, parse_size

CHOSEN = ("experts.bits", "experts.group_size")


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """`qmoe plan`."""
    config, fixed = config_from(args), given(args).get("experts", {})
    there = room()
    budget = Budget(
        None if args.vram is None else parse_size("--vram", args.vram),
        there.nbytes if args.ram is None else parse_size("--ram", args.ram),
        f"free {there.reason}" if args.ram is None else "given",
    )
    with find_headers(args.src, args.trust_remote_code) as folder:
        add = add_prediction if config.mtp == "quantize" else None
        source = open_source(folder, torch.float32, add)
        configs = schemes(source, config, fixed.get("bits"), fixed.get("group_size"))
        run = measure(source, args.context, args.batch, to_int8 if args.kv == "int8" else None)
        found = choose(source, configs, budget, run, args.batch)
    chosen = found.chosen
    if args.save is not None:
        made = RunPlan.of(chosen.placement, budget, args.context, args.batch, args.kv)
        made.write(Path(args.save).expanduser())
    return {
        "model": str(args.src),
        "context": args.context,
        "batch": args.batch,
        "kv": args.kv,
        "vram": budget.gpu,
        "ram": budget.host,
        "ram_is": budget.host_is,
        "scheme": vars(chosen.config.experts),
        "parts": [vars(part) for part in chosen.placement.parts],
        "bytes_on_disk": chosen.sizes.tensors + chosen.sizes.headers,
        "prediction": chosen.sizes.prediction,
        "candidates": [_candidate(candidate) for candidate in found.candidates],
        "commands": _commands(args, chosen, budget.gpu is not None),
    } | _candidate(chosen)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    placement = candidate.placement
    names = ("gpu", "host")
    return {
        "experts": describe(candidate.config.experts),
        "fits": placement.fits,
        "bytes": dict(zip(names, placement.total(), strict=True)),
        "short": dict(zip(names, placement.short, strict=True)),
        "experts_on_gpu": placement.on_gpu,
        "slots": placement.slots,
        "hybrid": placement.hybrid,
        "read_per_step": dict(zip(names, placement.read, strict=True)),
    }


def _commands(args: argparse.Namespace, chosen: Candidate, gpu: bool) -> list[str]:
    """What carries the plan out, with the settings that were given."""
    scheme = chosen.config.experts
    quantize = ["qmoe", "quantize", str(args.src), "DST", "--bits", str(scheme.bits)]
    quantize += ["--group-size", str(scheme.group_size), *as_options(args, CHOSEN)]
    run = ["qmoe", "bench", "DST", *(["--device", "cuda"] if gpu else [])]
    if args.save is not None or chosen.placement.hybrid:
        run += ["--plan", args.save or "FILE"]
    elif chosen.placement.expert_memory is not None:
        run += ["--expert-memory", f"{chosen.placement.expert_memory}B"]
    if args.kv == "int8" and "--plan" not in run:
        run += ["--kv", args.kv]
    return [shlex.join(quantize), shlex.join(run)]


def show_plan(result: dict[str, Any]) -> None:
    gpu = result["vram"] is not None
    memories = (["gpu"] if gpu else []) + ["host"]
    titles = {"gpu": "GPU", "host": "host memory"}
    header = ["part", *(titles[m] for m in memories)]
    rows = [[p["name"], *(_size(p[m]) for m in memories)] for p in result["parts"]]
    rows.append(["total", *(_size(result["bytes"][m]) for m in memories)])
    limits = {"gpu": result["vram"], "host": result["ram"]}
    rows.append(["given", *(_size(limits[m]) for m in memories)])
    sequences = "one sequence" if result["batch"] == 1 else f"{result['batch']} sequences"
    title = f"experts in {result['experts']}; {sequences} of {result['context']} tokens"
    tables.show(title, header, rows)
    header = ["experts", "fits", *(titles[m] for m in memories)]
    header += ["experts on the GPU"] * gpu
    header += [f"read from {titles[m]}" for m in memories]
    rows = [
        [
            c["experts"],
            "yes" if c["fits"] else "no",
            *(_size(c["bytes"][m]) for m in memories),
            *([f"{100 * c['experts_on_gpu']:.1f} %"] * gpu),
            *(_size(c["read_per_step"][m]) for m in memories),
        ]
        for c in result["candidates"]
    ]
    tables.show("schemes that were considered; the widest that fits is chosen", header, rows)
    if result["ram_is"] != "given":
        print(f"host memory: {format_size(result['ram'])} are {result['ram_is']}")
    print(
        f"read: bytes for one token of {sequences}, if all experts are used alike and the context "
        "is full"
    )
    print(
        f"prompts go through the model {AT_ONCE} tokens at a time: "
        f"model.generate(..., prefill_chunk_size={AT_ONCE})"
    )
    if result["hybrid"]:
        print(
            "experts that do not lie on the GPU are computed by the CPU, or copied where they have "
            "many tokens; --save FILE writes the plan that says so"
        )
    if result["prediction"]:
        print(
            f"{format_size(result['prediction'])} of the disk are for a layer that predicts tokens "
            "beyond the next, which is not loaded to run the model"
        )
    print(f"{format_size(result['bytes_on_disk'])} on disk; these commands make and run the model:")
    for command in result["commands"]:
        print(f"  {command}")


def _size(count: int) -> str:
    return format_size(count) if count else "-"
