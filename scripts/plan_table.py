"""What `qmoe plan` says of models that people run, without their weights.

    python -P scripts/plan_table.py                    # prints the table
    python -P scripts/plan_table.py --out docs/plan/table.md
    python -P scripts/plan_table.py Mixtral-8x7B --vram 12GB --context 32768

The sizes in plan_configs.json are those of the published models; for each a folder is written that
has the headers of its weights, in bfloat16, and no numbers.
"""

import argparse
import json
import logging
import warnings
from collections.abc import Iterator
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig

from qmoe.checkpoint.folders import CONFIG, INDEX
from qmoe.checkpoint.headers import write_header
from qmoe.checkpoint.model_folder import ModelFolder
from qmoe.config import QuantConfig
from qmoe.errors import ConfigError
from qmoe.model.skeleton import build
from qmoe.model.source import Source, open_source
from qmoe.model.tensor_names import all_original_names
from qmoe.plan.choose import measure, plan, schemes
from qmoe.plan.placement import Budget
from qmoe.system.sizes import format_size, parse_size

CONFIGS: dict[str, Any] = json.loads(Path(__file__).with_name("plan_configs.json").read_text())
VRAM = ("8GB", "12GB", "16GB", "24GB", "48GB")
SHARD = 4 << 30  # bytes of a file, about
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
HEADER = [
    "model", "VRAM", "experts", "on disk", "GPU", "host", "experts on the GPU", "GPU read",
    "host read",
]  # fmt: skip


def write_headers(config: dict[str, Any], folder: Path) -> None:
    """A model folder of this config.json whose weights are headers alone."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(config | {"dtype": "bfloat16"}))
    model = build(AutoConfig.from_pretrained(folder), torch.bfloat16)
    tied = model.all_tied_weights_keys
    parameters = {name: t for name, t in model.state_dict().items() if name not in tied}
    weight_map = {}
    for i, tensors in enumerate(_shards(all_original_names(model, parameters))):
        file = f"model-{i:05d}.safetensors"
        write_header(folder / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    """Entries of headers, file by file."""
    entries: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        size = prod(tensor.shape) * tensor.dtype.itemsize
        shape, kind = list(tensor.shape), NAMES[tensor.dtype]
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
        if at > SHARD:
            yield entries
            entries, at = {}, 0
    yield entries


def rows(name: str, source: Source, vram: list[str], ram: int, context: int) -> Iterator[list[str]]:
    """A row of the table for each size of GPU memory."""
    run, configs = measure(source, context), schemes(source, QuantConfig())
    for size in vram:
        try:
            chosen = plan(source, configs, Budget(parse_size("vram", size), ram), run).chosen
        except ConfigError as error:
            yield [name, size, _short(str(error)), *[""] * 6]
            continue
        placement, scheme = chosen.placement, chosen.config.experts
        gpu, host = map(format_size, placement.total())
        read_gpu, read_host = map(format_size, placement.read)
        disk = format_size(chosen.sizes.tensors + chosen.sizes.headers)
        words = f"{scheme.bits} bits, g{scheme.group_size}"
        share = f"{100 * placement.on_gpu:.0f} %"
        yield [name, size, words, disk, gpu, host, share, read_gpu, read_host]


def _short(error: str) -> str:
    """Of the message that nothing fits, what is missing with the smallest scheme."""
    words = error.split()
    missing = [
        f"{format_size(int(words[i - 1]))} of {'GPU' if 'GPU' in words[i - 6 : i] else 'host'}"
        for i, word in enumerate(words)
        if word == "more" and words[i - 1].isdigit()
    ]
    return f"none: {' and '.join(missing)} memory missing"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help=f"of {', '.join(CONFIGS)}; all if none is given")
    parser.add_argument("--vram", action="append", help=f"default: {', '.join(VRAM)}")
    parser.add_argument("--ram", default="32GB")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write it there, too")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of transformers: kernels that are not installed
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|---" + "|---:" * (len(HEADER) - 3) + "|"]
    print("\n".join(lines), flush=True)
    for name in args.models or CONFIGS:
        with TemporaryDirectory(prefix="qmoe-headers-") as made:
            folder = Path(made) / name
            write_headers(CONFIGS[name], folder)
            source = open_source(ModelFolder.find(folder), torch.float32)
            ram = parse_size("ram", args.ram)
            for row in rows(name, source, args.vram or list(VRAM), ram, args.context):
                lines.append(f"| {' | '.join(row)} |")
                print(lines[-1], flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(_page(args, lines))


def _page(args: argparse.Namespace, lines: list[str]) -> str:
    title = f"# Plans for a context of {args.context} tokens and {args.ram} of host memory"
    said = (
        "`python -P scripts/plan_table.py --out docs/plan/table.md` wrote this page.\n"
        "[plan.md](../plan.md) says what the columns mean."
    )
    return "\n".join([title, "", said, "", *lines, ""])


if __name__ == "__main__":
    main()
