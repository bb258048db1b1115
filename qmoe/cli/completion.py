"""`qmoe --completion SHELL`: a completion script, made by shtab of the parser itself."""

import argparse
from collections.abc import Sequence
from typing import Any


class Completion(argparse.Action):
    """Prints the script for the shell that is named, and ends."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        import shtab  # here, so that no other command waits for it

        print(shtab.complete(parser, shell=str(values)))
        parser.exit()
