"""`qmoe quantize` for a number of bytes, and how that is shown to a person."""

import argparse
from typing import Any

from qmoe.budget.quantize import Budget, quantize_to_size
from qmoe.calibration.text import merged
from qmoe.cli import tables
from qmoe.cli.settings import config_from, given
from qmoe.errors import ConfigError
from qmoe.system.sizes import format_size


def budget_of(args: argparse.Namespace) -> Budget | None:
    """The budget that was given; None if none was. Raises ConfigError for options that do not go
    together."""
    bits = getattr(args, "experts.bits")
    coded = given(args).get("format") == "exl3"
    if coded and (args.size is not None or args.vram is not None):
        raise ConfigError("--size, --vram: bits are not chosen for the format exl3; give --bits")
    average = bits if isinstance(bits, float) and not coded else None
    if args.size is None and args.vram is None and average is None:
        for option in ("measurements", "keep_matrices", "guard_text", "context", "ram"):
            if getattr(args, option) not in (None, False):
                name = option.replace("_", "-")
                raise ConfigError(f"--{name}: goes with --size, --vram or an average of --bits")
        return None
    if isinstance(bits, int):
        raise ConfigError("--bits: are chosen for a number of bytes; leave out --bits")
    if args.statistics or args.save_statistics:
        raise ConfigError("budget: matrices are measured on text; leave out saved statistics")
    more: dict[str, Any] = {} if args.context is None else {"context": args.context}
    if args.ram is not None:
        more["ram"] = args.ram
    if args.guard_text:
        more["guard_text"] = merged(args.guard_text)
    return Budget(args.size, average, args.vram, keep=args.keep_matrices, **more)


def to_size(args: argparse.Namespace, budget: Budget, how: dict[str, Any]) -> dict[str, Any]:
    """The report. how: the device, the memory and the like."""
    setattr(args, "experts.bits", None)
    config, kept = config_from(args), args.measurements
    return quantize_to_size(args.src, args.dst, budget, config, measurements=kept, **how)


def show_budget(told: dict[str, Any]) -> None:
    """What was predicted, measured and written."""
    rows = [
        [
            name,
            format_size(told["weight_files"][name]),
            f"{told['bits'][name]:.3f}",
            *(f"{value:.5f}" for value in kl.values()),
        ]
        for name, kl in told["kl"].items()
    ]
    domains = [f"KL {domain}" for domain in next(iter(told["kl"].values()))]
    title = (
        f"{format_size(told['bytes'])} are taken; the {told['written']} model was written "
        f"(predicted KL {told['predicted_kl']:.5f}, at most {100 * told['gap']:.2f} % above the "
        "best choice)"
    )
    tables.show(title, ["model", "weight files", "bits", *domains], rows)
