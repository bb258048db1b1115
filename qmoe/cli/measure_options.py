"""The options of `qmoe eval` and `qmoe bench`."""

import argparse
from typing import get_args

from qmoe.cli.help_texts import KV_HELP, SIZE_HELP, TEXT_HELP
from qmoe.config import Kv

STORED = "checkpoint"  # a dtype: the one that is stored


def eval_options(p: argparse.ArgumentParser) -> None:
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

    p.add_argument(
        "--tasks",
        action="append",
        metavar="NAMES",
        help="also run tasks of lm-eval: its names, or YAML files, comma separated or repeated; "
        "for them the original (--against) is loaded whole",
    )
    p.add_argument(
        "--task-limit", type=int, metavar="N", help="examples of each task (default: all)"
    )

    p.add_argument(
        "--answers",
        action="store_true",
        help="also let every model answer 4 prompts greedily, with at most 128 tokens each; the "
        "original (--against) is loaded whole for them",
    )
    p.add_argument(
        "--decision-token",
        action="append",
        metavar="TEXT",
        help="a token to be watched beside the end of the text, thoughts, calls and turns that the "
        "tokenizer names (repeatable)",
    )


def bench_options(p: argparse.ArgumentParser) -> None:
    _compare_options(p)
    p.add_argument("--prompt", type=int, default=256, help="tokens of the prompt")
    p.add_argument("--tokens", type=int, default=32, help="tokens decoded after it")
    p.add_argument("--batch", type=int, default=1, help="sequences decoded at once")
    p.add_argument("--threads", type=int, help="threads that compute (as many as torch takes)")
    p.add_argument("--repeats", type=int, default=5, help="rounds; models take turns in each")


def loading_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--device", default="cpu", help="cpu, or a GPU: cuda, cuda:1")
    p.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help=f"GPU memory for routed experts, {SIZE_HELP}; the others wait in host memory",
    )
    p.add_argument(
        "--plan",
        metavar="FILE",
        help="run as planned: a file of qmoe plan --save, or a folder of quantize --vram; hot "
        "experts lie on the GPU, and the CPU computes the others",
    )
    p.add_argument("--kv", choices=get_args(Kv), default="bf16", help=KV_HELP)
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


def _compare_options(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--save",
        action="store_true",
        help="keep the result in the folder (qmoe_measured.json), for its model card and report",
    )
    p.add_argument("path", help="quantized folder")
    p.add_argument("--against", metavar="ORIGINAL", help="the unquantized model to compare with")
    p.add_argument(
        "--baseline",
        nargs="+",
        choices=["rtn", "nf4"],
        default=[],
        help="also the original rounded to nearest, or in bitsandbytes NF4",
    )
