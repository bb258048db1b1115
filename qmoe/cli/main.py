"""The `qmoe` command: parse, call one public function, print. Heavy imports wait for a command."""

import argparse
import signal
from collections.abc import Sequence
from typing import Any

from qmoe.cli.options import build_parser
from qmoe.errors import QmoeError
from qmoe.system.printing import printing, say
from qmoe.system.progress import shown


def run(args: argparse.Namespace) -> int:
    """Carry out a parsed command and print its result; returns the exit status: 1 if `check` finds
    that an engine cannot run a folder, else 0."""
    from qmoe.cli import commands
    from qmoe.system.files import to_json

    with shown():
        result: dict[str, Any] = getattr(commands, args.command)(args)
    if not result:  # another process of this run shows it
        return 0
    whole = f"; the model in {args.dst} is whole, and has it" if args.command == "quantize" else ""
    with printing(f"the report{whole}"):
        if args.json:
            print(to_json(result))
        else:
            getattr(commands, f"show_{args.command}")(result)
    return int(args.command == "check" and not result["passes"])


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 on an error, 2 on bad usage, 130 interrupted."""
    # A polite kill, or a terminal that is closed, cleans up like Ctrl-C.
    for name in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) != signal.SIG_IGN:  # as nohup leaves it
            signal.signal(name, signal.default_int_handler)
    try:
        with printing("the help"):
            args = build_parser().parse_args(argv)
        return run(args)
    except QmoeError as error:
        say(f"error: {error}")
        return 1
    except BrokenPipeError:  # `qmoe ... | head` has seen enough
        return 1
    except KeyboardInterrupt:
        say("interrupted: the same command goes on where this one stopped")
        return 130
