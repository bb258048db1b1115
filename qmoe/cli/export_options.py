"""Options of `qmoe export`."""

import argparse


def export_options(p: argparse.ArgumentParser) -> None:
    """Those of `qmoe export`."""
    p.add_argument("path", help="quantized folder, or hub name of one")
    p.add_argument("--to", choices=["gguf"], required=True, help="form of the file")
    p.add_argument("--out", metavar="FILE", help="the file to make (the folder's name, here)")
    p.add_argument(
        "--no-tokenizer",
        action="store_true",
        help="leave the tokenizer out, if llama.cpp does not have its kind",
    )
