"""The subcommands of `qmoe` and their options. What `quantize`'s stand for is in settings.py."""

import argparse
from typing import get_args

from qmoe._version import __version__
from qmoe.cli.measured import METHODS
from qmoe.cli.renamed import add_renamed
from qmoe.cli.setting_options import (
    SETTINGS,
    SIZE_HELP,
    TEXT_HELP,
    budget_options,
    file_options,
    scheme_options,
    setting,
    text_options,
)
from qmoe.config import (
    PRESETS,
    Method,
    QuantConfig,
    Rotate,
    Target,
)

STORED = "checkpoint"  # a dtype: the one that is stored


def build_parser() -> argparse.ArgumentParser:
    """All subcommands and their options."""
    parser = argparse.ArgumentParser(
        prog="qmoe", description="Quantize Mixture-of-Experts language models and run them packed."
    )
    parser.add_argument("--version", action="version", version=f"qmoe {__version__}")
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
    inspect = commands.add_parser(
        "inspect", help="audit a quantized folder, or show a model's parts"
    )
    inspect.add_argument("path", help="a model folder or hub name")
    inspect.add_argument("--experts", action="store_true", help="show a row per layer and expert")
    inspect.add_argument(
        "--config",
        action="store_true",
        help="print the settings that a folder was quantized with, for quantize --config",
    )
    evaluate = commands.add_parser("eval", help="perplexity by domain, KL and agreement")
    _eval_options(evaluate)
    bench = commands.add_parser("bench", help="prefill and decode speed, latency, memory")
    _bench_options(bench)
    for sub in (evaluate, bench):
        _loading_options(sub)
    families = "MoE families of the installed transformers"
    _families_options(commands.add_parser("families", help=families))
    for name, sub in commands.choices.items():
        if name != "families":
            sub.add_argument(
                "--trust-remote-code",
                action="store_true",
                help="run code that lies beside the weights, if transformers has no such model",
            )
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        add_renamed(name, sub)
    return parser


def _bench_options(p: argparse.ArgumentParser) -> None:
    _compare_options(p)
    p.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    p.add_argument("--tokens", type=int, default=32, help="tokens decoded after it")
    p.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    p.add_argument("--threads", type=int, help="threads that compute (as many as torch takes)")
    p.add_argument("--repeats", type=int, default=5, help="rounds; models take turns in each")


def _loading_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="cpu", help="cpu, or a GPU: cuda, cuda:1")
    p.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help=f"GPU memory for routed experts, {SIZE_HELP}; the others wait in host memory",
    )
    p.add_argument(
        "--activations",
        choices=["int8", "bf16"],
        default="int8",
        help="inputs of packed products on a CPU: rounded to 8 bits, or as they are (slower); "
        "models in float32 always take them as they are",
    )
    p.add_argument(
        "--no-cache",
        action="store_true",
        help="keep no weights in the CPU kernels' layout in the user's cache directory",
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
    vllm = "what is to run the result; vllm takes one scheme for all routed experts of a layer"
    setting(given, "--target", "target", d.target, get_args(Target), help=vllm)
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
    given = p.add_argument_group(
        "settings of quantize", f"{SETTINGS}Bits and group size that are given are not chosen."
    )
    scheme_options(given)
    file_options(given)
    p.set_defaults(preset=None, statistics=[])


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


def _eval_options(p: argparse.ArgumentParser) -> None:
    _compare_options(p)
    p.add_argument("--text", action="append", help=f"{TEXT_HELP} (heldout)")
    p.add_argument("--samples", type=int, default=16, help="samples scored per domain")
    p.add_argument("--seqlen", type=int, default=256, help="tokens in a sample")
    p.add_argument("--batch", type=int, default=8, help="samples per forward pass")
    p.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", STORED],
        default="float32",
        help="of activations; float32 shows what the weights lost and nothing else, "
        f"{STORED} is the checkpoint's own, in which models are loaded and run",
    )


def _compare_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", help="quantized folder")
    p.add_argument("--against", metavar="ORIGINAL", help="the unquantized model to compare with")
    p.add_argument(
        "--baseline",
        nargs="+",
        choices=["rtn", "nf4"],
        default=[],
        help="also the original rounded to nearest, or in bitsandbytes NF4",
    )
