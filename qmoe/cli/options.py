"""The subcommands of `qmoe` and their options. What `quantize`'s stand for is in settings.py."""

import argparse
from collections.abc import Sequence
from typing import Any, get_args

from qmoe._version import __version__
from qmoe.cli.completion import Completion
from qmoe.cli.help_texts import SIZE_HELP, TEXT_HELP
from qmoe.cli.measure_options import bench_options, eval_options, loading_options
from qmoe.cli.measured import METHODS
from qmoe.cli.options_export import export_options
from qmoe.cli.renamed import add_renamed
from qmoe.config import (
    BITS,
    CHANNEL,
    GROUPS,
    PRESETS,
    UNQUANTIZED,
    Method,
    QuantConfig,
    Rotate,
    Target,
)

SETTINGS = """\
The name in brackets is that of the setting in --config, in --set and in the report. --config
overrides the preset, options override --config, and --set overrides options.
"""


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
    _report_options(
        commands.add_parser(
            "report",
            help="one HTML page on a quantized folder",
            description="Write one page of HTML on a quantized folder: bytes, bits, quality, use "
            "and errors of every expert, routing, memory, fallbacks and provenance. It needs no "
            "network.",
        )
    )
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
        if name not in ("families", "info"):
            sub.add_argument(
                "--trust-remote-code",
                action="store_true",
                help="run code that lies beside the weights, if transformers has no such model",
            )
        sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
        add_renamed(name, sub)
    return parser


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
    _setting(given, "--method", "method", d.method, get_args(Method), help=method)
    _scheme_options(given, averages=True)
    engine = "what is to run the result: vllm takes one scheme for all routed experts of a layer; "
    engine += (
        "llama.cpp takes groups of 32 and scales that `qmoe export --to gguf` writes as they are"
    )
    _setting(given, "--target", "target", d.target, get_args(Target), help=engine)
    tune = "steps of tuning each layer towards the original's output"
    _setting(given, "--tune", "tune", d.tune, metavar="STEPS", help=tune)
    _text_options(given)
    _file_options(given)
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
    _budget_options(p)
    p.add_argument("--save-statistics", metavar="DIR", help="keep Hessians and counts there")
    p.add_argument(
        "--statistics",
        metavar="DIR",
        nargs="+",
        default=[],
        help="use the sum of statistics saved before instead of calibration text",
    )


def _setting(
    group: Any,
    option: str,
    name: str,
    default: int | str,
    choices: Sequence[int | str] | None = None,
    *,
    help: str,
    **more: Any,
) -> None:
    """An option of the default's type that sets `name`; its help ends with both."""
    help = f"{help} [{name}, {default} by default]"
    group.add_argument(option, dest=name, type=type(default), choices=choices, help=help, **more)


def _budget_options(p: argparse.ArgumentParser) -> None:
    budget = p.add_argument_group(
        "a number of bytes",
        "With --size, --vram or an average of --bits, bits are chosen for every expert, matrix and "
        "linear, and the result is compared with the uniform one of the same bytes.",
    )
    budget.add_argument("--size", metavar="SIZE", help=f"of the weight files, {SIZE_HELP}")
    budget.add_argument(
        "--vram", metavar="SIZE", help="of a GPU's memory that holds all of the model, likewise"
    )
    budget.add_argument(
        "--context", type=int, metavar="N", help="with --vram: tokens of a sequence (default: 8192)"
    )
    budget.add_argument(
        "--measurements",
        metavar="DIR",
        help="what is measured of every matrix: made there, or used if it is there "
        "(default: DST.measurements)",
    )
    budget.add_argument(
        "--guard-text",
        metavar="TEXT",
        action="append",
        help="held-out text for that comparison, in the form of --calibration (default: heldout)",
    )


def bits_or_average(text: str) -> int | float:
    """Bits of all experts as a whole number, an average as one with a decimal point."""
    if text in map(str, BITS):
        return int(text)
    if "." in text:
        return float(text)
    raise argparse.ArgumentTypeError(
        f"expected one of {BITS}, or an average with a decimal point such as 3.2, got {text!r}"
    )


def _scheme_options(p: Any, averages: bool = False) -> None:
    """averages: whether --bits may be one."""
    d = QuantConfig()
    assert d.dense is not None
    widths = [*BITS, UNQUANTIZED]
    dense = "bits of attention, shared experts and dense MLPs; 16 leaves them"
    if averages:
        p.add_argument(
            "--bits",
            dest="experts.bits",
            type=bits_or_average,
            metavar="BITS",
            help="bits of routed experts: 2, 3, 4 or 8; or, with a decimal point, the average bits "
            "of a quantized weight, for which bits are chosen (see --size) "
            f"[experts.bits, {d.experts.bits} by default]",
        )
    else:
        _setting(p, "--bits", "experts.bits", d.experts.bits, BITS, help="bits of routed experts")
    _setting(
        p,
        "--group-size",
        "experts.group_size",
        d.experts.group_size,
        [*GROUPS, CHANNEL],
        help="inputs per scale in experts; -1 is one scale per output channel",
    )
    p.add_argument(
        "--asymmetric",
        dest="experts.symmetric",
        action="store_const",
        const=False,
        help="give experts zero points: less loss, but the result loads in qmoe only "
        "[experts.symmetric, true by default]",
    )
    _setting(p, "--dense-bits", "dense.bits", d.dense.bits, widths, help=dense)
    _setting(p, "--lm-head-bits", "lm_head.bits", 16, widths, help="bits of lm_head; 16 leaves it")
    _setting(
        p,
        "--rotate",
        "rotate",
        d.rotate,
        get_args(Rotate),
        help="Hadamard rotation of what quantized weights read. online: of all of them, partly at "
        "run time; the result loads in qmoe only. fused: of the residual stream, inside the "
        "weights around it: no work at run time, loads like any other; half of the families are "
        "refused",
    )


def _file_options(p: Any) -> None:
    p.add_argument(
        "--config",
        metavar="FILE.toml",
        help="read settings from a file; `qmoe inspect --config DIR` prints one",
    )
    p.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="set anything else, as in --set damp=0.02 --set dense.group_size=128; "
        "`pydoc qmoe.QuantConfig` explains every name",
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
    _scheme_options(given)
    _file_options(given)
    p.set_defaults(preset=None, target=None, statistics=[])


def _text_options(p: Any) -> None:
    c = QuantConfig().calibration
    p.add_argument(
        "--calibration",
        dest="calibration.text",
        metavar="TEXT",
        action="append",
        help=f"calibration {TEXT_HELP} [calibration.text, {c.text} by default]",
    )
    for name, said in (
        ("samples", "samples of that text, spread evenly over its domains"),
        ("self_samples", "samples more that the model writes itself"),
        ("seqlen", "tokens in a sample"),
        ("seed", "seed of the samples' choice"),
    ):
        option, default = f"--{name.replace('_', '-')}", getattr(c, name)
        _setting(p, option, f"calibration.{name}", default, metavar="N", help=said)


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
