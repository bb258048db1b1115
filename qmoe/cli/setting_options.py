"""Options that stand for settings: of `quantize`, and those of them that `plan` has too."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, get_args

from qmoe.cli.help_texts import SIZE_HELP, TEXT_HELP
from qmoe.config import BITS, CHANNEL, GROUPS, Format, QuantConfig, Rotate

SETTINGS = """\
The name in brackets is that of the setting in --config, in --set and in the report. --config
overrides the preset, options override --config, and --set overrides options.
"""


def setting(
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


def budget_options(p: argparse.ArgumentParser) -> None:
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
        "--ram",
        metavar="SIZE",
        help="with --vram: of host memory, where the experts lie that the GPU does not hold",
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
        "--keep-matrices",
        action="store_true",
        help="keep all that is solved while measuring, and put models together of that: another "
        "budget then takes seconds and the comparison, and loses a little more",
    )
    budget.add_argument(
        "--guard-text",
        metavar="TEXT",
        action="append",
        help="held-out text for that comparison, in the form of --calibration (default: heldout)",
    )


def bits_or_average(text: str) -> int | float:
    """Bits of all experts as a whole number, an average (or a rate of EXL3's codes) as one with a
    decimal point."""
    if text.isdigit():
        return int(text)
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected one of {BITS}, or an average with a decimal point such as 3.2, got {text!r}"
        ) from None


def rate(text: str) -> int | float:
    """Bits as a whole number, or the half of one."""
    value = float(text)
    return int(value) if value.is_integer() else value


def scheme_options(p: Any, averages: bool = False) -> None:
    """averages: whether --bits may be one."""
    d = QuantConfig()
    assert d.dense is not None
    dense = "bits of attention, shared experts and dense MLPs; 16 leaves them"
    if averages:
        setting(p, "--format", "format", d.format, get_args(Format), help="what is written")
        p.add_argument(
            "--bits",
            dest="experts.bits",
            type=bits_or_average,
            metavar="BITS",
            help="bits of routed experts: 2, 3, 4 or 8; or, with a decimal point, the average bits "
            "of a quantized weight, for which bits are chosen (see --size); of exl3 1 to "
            "8 in halves "
            f"[experts.bits, {d.experts.bits} by default]",
        )
    else:
        setting(p, "--bits", "experts.bits", d.experts.bits, BITS, help="bits of routed experts")
    setting(
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
    setting(p, "--dense-bits", "dense.bits", d.dense.bits, kind=rate, help=dense)
    head = "bits of lm_head; 16 leaves it"
    setting(p, "--lm-head-bits", "lm_head.bits", 16, kind=rate, help=head)
    setting(
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


def file_options(p: Any) -> None:
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


def text_options(p: Any) -> None:
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
    ):
        option, default = f"--{name.replace('_', '-')}", getattr(c, name)
        setting(p, option, f"calibration.{name}", default, metavar="N", help=said)
