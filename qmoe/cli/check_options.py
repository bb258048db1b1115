"""Options of `qmoe check`."""

import argparse


def check_options(p: argparse.ArgumentParser) -> None:
    """Those of `qmoe check`."""
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
