"""The subcommands of `qmoe` and their options. What `quantize`'s stand for is in settings.py."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, get_args

from qmoe._version import __version__
from qmoe.cli.measured import METHODS
from qmoe.cli.renamed import add_renamed
from qmoe.config import CHANNEL, GROUPS, PRESETS, Format, Method, QuantConfig, Rotate

STORED = "checkpoint"  # a dtype: the one that is stored
TEXT_HELP = (
    "text, comma separated or repeated: bundled[:DOMAIN+DOMAIN], heldout[:DOMAIN+DOMAIN], "
    "PATH[:COLUMN] of a file, folder or glob, or hf:NAME[/CONFIG][:SPLIT[:COLUMN]] for a dataset"
)
SIZE_HELP = "as in 12GB (10^9 bytes each), 12GiB (2^30) or 500MB"
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
    _setting(given, "--method", "method", d.method, get_args(Method), help=method)
    _scheme_options(given)
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
    kind: Callable[[str], Any] | None = None,
    **more: Any,
) -> None:
    """An option that sets `name`, of the default's type or read by `kind`; its help ends with
    both."""
    help, kind = f"{help} [{name}, {default} by default]", kind or type(default)
    group.add_argument(option, dest=name, type=kind, choices=choices, help=help, **more)


def _bits(text: str) -> int | float:
    """A whole number, or the half of one."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _scheme_options(p: Any) -> None:
    d = QuantConfig()
    assert d.dense is not None
    dense = "bits of attention, shared experts and dense MLPs; 16 leaves them"
    _setting(p, "--format", "format", d.format, get_args(Format), help="what is written")
    bits = "bits of routed experts; of the format exl3 1 to 8 in halves"
    _setting(p, "--bits", "experts.bits", d.experts.bits, help=bits, kind=_bits)
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
    _setting(p, "--dense-bits", "dense.bits", d.dense.bits, help=dense, kind=_bits)
    _setting(
        p, "--lm-head-bits", "lm_head.bits", 16, help="bits of lm_head; 16 leaves it", kind=_bits
    )
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
    p.set_defaults(preset=None, statistics=[])


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
