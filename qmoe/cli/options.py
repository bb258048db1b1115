"""The options of the `qmoe` command, and the settings that they stand for."""

import argparse
from typing import Any, get_args

from qmoe._version import __version__
from qmoe.calibration.text import merged
from qmoe.config import (
    BITS,
    CHANNEL,
    GROUPS,
    PRESETS,
    CalibrationConfig,
    Method,
    QuantConfig,
    Rotate,
    Scheme,
)
from qmoe.errors import ConfigError

METHODS = """\
presets: what --search-grid, --refit, --tune, --samples and --self-samples are unless given, with
KL to the original as a share of round-to-nearest's, everything at 2 bits g128 asymmetric, on a 21 M
parameter Qwen3-MoE (32 experts, top-4), calibrated on text of seven domains / of one domain only,
reported on test text of all seven; CPU seconds of quantizing it; docs/quality has peers as well:
  fast      0.23 / 0.35    23 s  GPTQ on min-max grids
  balanced  0.13 / 0.14    39 s  grids and integers searched under the Hessian; matrices fitted to
                                 what quantized ones give; half of the text is the model's own
  best      0.07 / 0.08   340 s  more of both kinds of text; each layer tuned by gradient
methods, likewise at 4 bits, in thousandths of a nat per token:
  rtn       2.73 / 2.73   round to nearest, needs no text
  awq       2.57 / 2.67   activation-aware scales folded into norms and experts, then rtn
  awq-gptq                the same scales, then GPTQ
  gptq      0.77 / 1.16   Hessian-based error feedback per expert (default; here with preset fast)
"""
STORED = "checkpoint"  # a dtype: the one that is stored
TEXT_NUMBERS = ("samples", "self_samples", "seqlen", "batch", "seed")
TEXT_HELP = (
    "text, comma separated or repeated: bundled[:DOMAIN+DOMAIN], heldout[:DOMAIN+DOMAIN], "
    "PATH[:COLUMN] of a file, folder or glob, or hf:NAME[/CONFIG][:SPLIT[:COLUMN]] for a dataset"
)


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
            epilog=METHODS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    inspect = commands.add_parser(
        "inspect", help="audit a quantized folder, or show a model's parts"
    )
    inspect.add_argument("path")
    inspect.add_argument("--experts", action="store_true", help="one row per layer and expert")
    evaluate = commands.add_parser("eval", help="perplexity by domain, KL and agreement")
    _compare_options(evaluate)
    evaluate.add_argument("--text", action="append", help=f"{TEXT_HELP} (heldout)")
    evaluate.add_argument("--samples", type=int, default=16, help="samples scored per domain")
    evaluate.add_argument("--seqlen", type=int, default=256, help="tokens in a sample")
    evaluate.add_argument("--batch", type=int, default=8, help="samples per forward pass")
    evaluate.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16", STORED],
        default="float32",
        help="of activations; float32 shows what the weights lost and nothing else, "
        f"{STORED} is the checkpoint's own, in which models are loaded and run",
    )
    bench = commands.add_parser("bench", help="prefill and decode speed, latency, memory")
    _compare_options(bench)
    bench.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    bench.add_argument("--tokens", type=int, default=32, help="tokens decoded after it")
    bench.add_argument("--repeats", type=int, default=5, help="rounds; models take turns in each")
    for sub in (evaluate, bench):
        sub.add_argument("--device", default="cpu", help="cpu, or a GPU: cuda, cuda:1")
        sub.add_argument(
            "--expert-memory",
            type=float,
            metavar="GB",
            help="GPU memory for routed experts; those beyond it wait in host memory",
        )
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
    return parser


def _quantize_options(p: argparse.ArgumentParser) -> None:
    d, c = QuantConfig(), CalibrationConfig()
    p.add_argument("src", help="model folder or hub name")
    p.add_argument("dst", help="new folder")
    p.add_argument(
        "--preset",
        choices=list(PRESETS),
        default="balanced",
        help="what options below are when they are not given (see the end of this help)",
    )
    p.add_argument("--method", choices=get_args(Method), default=d.method)
    _scheme_options(p)
    p.add_argument("--no-act-order", action="store_true", help="GPTQ in column order")
    p.add_argument("--no-gate-weight", action="store_true", help="all routed tokens count alike")
    p.add_argument(
        "--search-grid",
        action=argparse.BooleanOptionalAction,
        help="grids and integers beyond GPTQ's one pass on min-max grids",
    )
    p.add_argument(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="fit matrices to what the quantized ones before them give; takes text",
    )
    p.add_argument("--tune", type=int, metavar="STEPS", help="tuning each layer's output; 0: none")
    p.add_argument("--damp", type=float, default=d.damp, help="share of the mean Hessian diagonal")
    p.add_argument(
        "--min-tokens",
        type=int,
        default=d.min_tokens,
        help="experts with fewer calibration tokens borrow tokens of their layer",
    )
    # Without defaults: what is given contradicts --statistics.
    text = f"{TEXT_HELP} ({c.text})"
    p.add_argument("--calibration", metavar="TEXT", action="append", help=text)
    p.add_argument("--samples", type=int, help="samples of that text (by preset)")
    p.add_argument(
        "--self-samples", type=int, help="and samples the model writes itself (by preset)"
    )
    p.add_argument("--seqlen", type=int, help=f"tokens in a sample ({c.seqlen})")
    p.add_argument("--batch", type=int, help=f"samples per forward pass ({c.batch})")
    p.add_argument("--seed", type=int, help=f"of the choice of samples ({c.seed})")
    p.add_argument(
        "--device",
        default="cpu",
        help="where layers are run and solved: cpu, or a GPU: cuda, cuda:1",
    )
    p.add_argument(
        "--max-memory",
        type=float,
        metavar="GB",
        help="memory of one process (default: what is free); activations beyond it wait on disk",
    )
    p.add_argument("--save-statistics", metavar="DIR", help="keep Hessians and counts there")
    p.add_argument(
        "--statistics",
        metavar="DIR",
        nargs="+",
        default=[],
        help="use the sum of statistics saved before instead of calibration text",
    )


def _scheme_options(p: argparse.ArgumentParser) -> None:
    d = QuantConfig()
    p.add_argument("--bits", type=int, choices=BITS, default=d.experts.bits, help="of experts")
    p.add_argument(
        "--group-size",
        type=int,
        choices=[*GROUPS, CHANNEL],
        default=d.experts.group_size,
        help="inputs per scale in experts; -1 is one scale per output channel",
    )
    p.add_argument(
        "--asymmetric",
        action="store_true",
        help="experts with zero points: less loss, but the result loads in qmoe only",
    )
    p.add_argument(
        "--dense-bits",
        type=int,
        choices=[*BITS, 16],
        default=8,
        help="attention, shared experts, dense MLPs; 16 leaves them",
    )
    p.add_argument("--dense-group-size", type=int, choices=[*GROUPS, CHANNEL], default=CHANNEL)
    p.add_argument("--dense-asymmetric", action="store_true")
    p.add_argument(
        "--rotate",
        choices=get_args(Rotate),
        default=d.rotate,
        help="Hadamard rotation of what quantized weights read. online: of all of them, partly at "
        "run time: at 2 bits, with balanced, 3 %% less KL to 1 %% more on the small models of "
        "docs/quality, and decoding on a CPU takes a fifth longer; the result loads in qmoe only. "
        "fused: of the residual stream, put into all weights around it: 5 %% less to 3 %% more, "
        "nothing to do at run time, loads like any other; half of the families are refused",
    )
    p.add_argument("--lm-head-bits", type=int, choices=[*BITS, 16], default=16, help="16 leaves it")


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


def config_from(args: argparse.Namespace) -> QuantConfig:
    """The QuantConfig that `quantize`'s options describe."""
    given = {"search_grid": args.search_grid, "refit": args.refit, "tune": args.tune}
    given |= _text_options(args)
    return QuantConfig.preset(
        args.preset if args.method.endswith("gptq") else "fast",
        method=args.method,
        experts=Scheme(args.bits, args.group_size, not args.asymmetric),
        dense=_outside_experts(args, args.dense_bits),
        lm_head=_outside_experts(args, args.lm_head_bits),
        act_order=not args.no_act_order,
        rotate=args.rotate,
        damp=args.damp,
        routing_weighted=not args.no_gate_weight,
        min_tokens=args.min_tokens,
        **{name: value for name, value in given.items() if value is not None},
    )


def _outside_experts(args: argparse.Namespace, bits: int) -> Scheme | None:
    group, symmetric = args.dense_group_size, not args.dense_asymmetric
    return None if bits == 16 else Scheme(bits, group, symmetric)


def _text_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of the options about calibration text, by CalibrationConfig's names."""
    names = {"calibration": "text"} | {n: n for n in TEXT_NUMBERS}
    given = {n: getattr(args, n) for n in names if getattr(args, n) is not None}
    if args.statistics and given:
        raise ConfigError(
            f"--{next(iter(given))}: with --statistics no text is run; leave out one of the two"
        )
    if "calibration" in given:
        given["calibration"] = merged(given["calibration"])
    return {names[n]: value for n, value in given.items()}
