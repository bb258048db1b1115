"""`qmoe check` and its options."""

from typing import Any


def add_check(commands: Any) -> None:
    """`qmoe check`, among the subcommands."""
    p = commands.add_parser(
        "check",
        help="whether another engine can run a quantized folder",
        description="Say which tensor of a quantized folder breaks which rule of an engine, from "
        "config.json and the headers of the weights alone. The exit status is 1 if one does.",
    )
    p.add_argument("path", help="quantized folder or hub name; no weights are loaded")
    p.add_argument(
        "--engine",
        choices=["vllm", "sglang", "transformers", "llama.cpp"],
        required=True,
        help="whose rules; vllm and transformers are meant without qmoe in them",
    )
    p.add_argument(
        "--tp", type=int, default=1, metavar="N", help="devices that share every layer (1)"
    )
    p.add_argument(
        "--device",
        choices=["cuda", "cpu"],
        default="cuda",
        help="with vllm: where it runs (cuda), which decides between its kernels",
    )
