"""`qmoe quantize` for a number of bytes, and how that is shown to a person."""

import argparse
from typing import Any

from qmoe.budget.quantize import quantize_to_size
from qmoe.calibration.text import merged
from qmoe.cli import tables
from qmoe.cli.settings import config_from
from qmoe.errors import ConfigError
from qmoe.system.sizes import format_size


def budget_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """The size or the average bits that were given, as `quantize_to_size` takes them; None where
    neither was. Raises ConfigError for options that do not go together."""
    bits = getattr(args, "experts.bits")
    if args.size is None and not isinstance(bits, float):
        for option in ("measurements", "guard_text"):
            if getattr(args, option) is not None:
                name = option.replace("_", "-")
                raise ConfigError(f"--{name}: goes with --size or an average of --bits")
        return None
    if args.size is not None and bits is not None:
        raise ConfigError("--size: chooses the bits; leave out --bits")
    if args.statistics or args.save_statistics:
        raise ConfigError("--size: measures on text; leave out saved statistics")
    return {"size": args.size} if args.size is not None else {"bits": bits}


def to_size(
    args: argparse.Namespace, budget: dict[str, Any], how: dict[str, Any]
) -> dict[str, Any]:
    """The report. how: the device, the memory and the like."""
    setattr(args, "experts.bits", None)
    text = merged(args.guard_text) if args.guard_text else "heldout"
    config, kept = config_from(args), args.measurements
    return quantize_to_size(
        args.src, args.dst, config, measurements=kept, guard_text=text, **budget, **how
    )


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
        f"{format_size(told['bytes'])} were given; the {told['written']} model was written "
        f"(predicted KL {told['predicted_kl']:.5f}, at most {100 * told['gap']:.2f} % above the "
        "best choice)"
    )
    tables.show(title, ["model", "weight files", "bits", *domains], rows)
