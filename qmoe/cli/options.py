"""The subcommands of `qmoe` and their options. What `quantize`'s stand for is in settings.py."""

import argparse
from typing import get_args

from qmoe._version import __version__
from qmoe.cli.check_options import add_check
from qmoe.cli.completion import Completion
from qmoe.cli.export_options import export_options
from qmoe.cli.help_texts import KV_HELP, SIZE_HELP
from qmoe.cli.measure_options import bench_options, eval_options, loading_options
from qmoe.cli.measured import METHODS
from qmoe.cli.renamed import add_renamed
from qmoe.cli.setting_options import (
    SETTINGS,
    budget_options,
    file_options,
    scheme_options,
    setting,
    text_options,
)
from qmoe.config import (
    PRESETS,
    Kv,
    Method,
    QuantConfig,
    Rotate,
    Target,
)


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(
        prog="qmoe", description="Quantize Mixture-of-Experts language models and run them packed."
    )
    parser.add_argument("--version", action="version", version=f"qmoe {__version__}")
    parser.add_argument(
        "--completion",
        action=Completion,
        choices=["bash", "zsh", "tcsh"],
        help="print a script that completes commands and options in this shell",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _quantize_options(
        commands.add_parser(
            "quantize",
            help="quantize a model folder or hub name into a new folder",
            description="Quantize a Mixture-of-Experts model.",
            epilog=METHODS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    _plan_options(
        commands.add_parser(
            "plan",
            help="what a model takes, and the widest experts with which it fits",
            description="Find out which bits of the routed experts fit into memory, and where "
            "everything lies. Only config.json and the headers of the weights are read.",
        )
    )
    inspect = "audit a quantized folder, or show a model's parts"
    _inspect_options(commands.add_parser("inspect", help=inspect))
    _report_options(
        commands.add_parser(
            "report",
            help="one HTML page on a quantized folder",
            description="Write one page of HTML on a quantized folder: bytes, bits, quality, use "
            "and errors of every expert, routing, memory, fallbacks and provenance. It needs no "
            "network.",
        )
    )
    add_check(commands)
    export_options(commands.add_parser("export", help="write a quantized folder for llama.cpp"))
    evaluate = commands.add_parser("eval", help="perplexity by domain, KL and agreement")
    eval_options(evaluate)
    bench = commands.add_parser("bench", help="prefill and decode speed, latency, memory")
    bench_options(bench)
    for sub in (evaluate, bench):
        loading_options(sub)
    families = "MoE families of the installed transformers"
    _families_options(commands.add_parser("families", help=families))
    info = commands.add_parser(
        "info",
        help="versions, processor, GPUs, kernels, memory and cache, for bug reports",
        description="Show what qmoe runs on. A bug report should contain this output.",
    )
    _info_options(info)
    for name, sub in commands.choices.items():
        _common_options(name, sub)
    return parser


def _common_options(name: str, p: argparse.ArgumentParser) -> None:
    if name not in ("families", "info"):
        p.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="run code that lies beside the weights, if transformers has no such model",
        )
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    add_renamed(name, p)


def _inspect_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", help="a model folder or hub name")
    p.add_argument("--experts", action="store_true", help="show a row per layer and expert")
    p.add_argument(
        "--config",
        action="store_true",
        help="print the settings that a folder was quantized with, for quantize --config",
    )


def _report_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", help="a quantized folder or hub name")
    p.add_argument("--compare", metavar="OTHER", help="a second one, to be shown beside it")
    p.add_argument(
        "--output", metavar="FILE", default="report.html", help="the file to write (report.html)"
    )


def _info_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--clear-cache",
        nargs="?",
        type=float,
        const=0,
        metavar="DAYS",
        help="remove prepared weights from the cache: all, or those that nothing has read for so "
        "many days",
    )


def _quantize_options(p: argparse.ArgumentParser) -> None:
    """Options about settings have no defaults: what is not given leaves the preset or the config
    file as it is."""
    d = QuantConfig()
    p.add_argument("src", help="a model folder or hub name")
    p.add_argument("dst", help="the folder to make")
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        help="settings to start from, described below; balanced is the default of every setting",
    )
    given = p.add_argument_group("settings", SETTINGS)
    method = "how weights are rounded, described below"
    setting(given, "--method", "method", d.method, get_args(Method), help=method)
    scheme_options(given, averages=True)
    engine = "what is to run the result, whose rules the settings have to keep (see `qmoe check`): "
    engine += "vllm and sglang take one scheme for all routed experts of a layer; llama.cpp takes "
    engine += "groups of 32 and scales that `qmoe export --to gguf` writes as they are"
    setting(given, "--target", "target", d.target, get_args(Target), help=engine)
    tune = "steps of tuning each layer towards the original's output"
    setting(given, "--tune", "tune", d.tune, metavar="STEPS", help=tune)
    text_options(given)
    file_options(given)
    p.add_argument(
        "--device",
        default="cpu",
        help="where layers are run and solved: cpu, or a GPU: cuda, cuda:1",
    )
    p.add_argument(
        "--max-memory",
        metavar="SIZE",
        help=f"memory of one process, {SIZE_HELP} (default: what is free); activations beyond it "
        "wait on disk",
    )
    budget_options(p)
    p.add_argument("--save-statistics", metavar="DIR", help="keep Hessians and counts there")
    p.add_argument(
        "--statistics",
        metavar="DIR",
        nargs="+",
        default=[],
        help="use the sum of statistics saved before instead of calibration text",
    )


def _plan_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("src", help="a model folder or hub name; of a hub name no weights are loaded")
    p.add_argument(
        "--vram", metavar="SIZE", help=f"memory of the GPU, {SIZE_HELP}; without it, the CPU runs"
    )
    p.add_argument(
        "--ram", metavar="SIZE", help="host memory, in the same form (default: what is free here)"
    )
    p.add_argument("--context", type=int, default=8192, help="tokens of a sequence")
    p.add_argument("--batch", type=int, default=1, help="sequences at once")
    p.add_argument("--kv", choices=get_args(Kv), default="bf16", help=KV_HELP)
    p.add_argument(
        "--save", metavar="FILE", help="write the plan there, for --plan of bench and eval"
    )
    given = p.add_argument_group(
        "settings of quantize", f"{SETTINGS}Bits and group size that are given are not chosen."
    )
    scheme_options(given)
    file_options(given)
    p.set_defaults(preset=None, target=None, statistics=[])


def _families_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("names", nargs="*", help="model types; all if none is given")
    p.add_argument(
        "--check",
        action="store_true",
        help="quantize, save, reload and compare a tiny random model of each (minutes)",
    )
    p.add_argument(
        "--rotate", choices=get_args(Rotate), default="off", help="with --check: rotated like that"
    )
