"""Memory and time of quantizing layers of a real size, with random weights.

    python scripts/bench_quantize.py --layers 2 8

Each model has the layer shapes of Qwen3-30B-A3B (1.25 GB a layer) unless told otherwise, is written
to a temporary folder, quantized by a process of its own, and removed. Prints the process's largest
resident memory, wall time per layer, and what it was spent on. With `--peer PYTHON`, the Python of
an environment that has llm-compressor, its GPTQ quantizes the smallest of the models right after.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qmoe.cli import tables
from qmoe.system.sizes import format_size

HERE = Path(__file__).resolve().parent
ALLOWED = (2.5, 1.5e9)  # times the bytes of a layer, and bytes beside


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--samples", type=int, default=32, help="of 256 tokens, for calibration")
    parser.add_argument(
        "--preset",
        choices=["fast", "balanced"],
        default="fast",
        help="fast is the GPTQ that others have; no text is written by these random models",
    )
    parser.add_argument("--peer", metavar="PYTHON", help="compare with llm-compressor there")
    parser.add_argument("--child", nargs=2, metavar=("SRC", "DST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(_quantize(*args.child, args.preset, args.samples)))
        return 0
    layer = args.experts * 3 * args.hidden * args.intermediate * 2
    rows, peaks, good = [], [], True
    for layers in args.layers:
        with tempfile.TemporaryDirectory(prefix="qmoe-bench-") as folder:
            found = _measure(args, layers, Path(folder))
            if args.peer and layers == min(args.layers):
                good = _against(args, found, Path(folder))
        peaks.append(found["peak"])
        seconds = found["seconds"]
        known = sum(found["spent"].values())
        spent = ", ".join(f"{k} {100 * v / seconds:.0f} %" for k, v in found["spent"].items())
        rest = f", other {100 * (seconds - known) / seconds:.0f} %"
        rows.append([str(layers), format_size(layers * layer), format_size(found["peak"]),
                     f"{seconds / layers:.0f}", spent + rest])  # fmt: skip
    header = ["layers", "experts in bf16", "peak memory", "s per layer", "spent on"]
    tables.show(f"quantizing, {args.preset}, int4 g128", header, rows)
    allowed = ALLOWED[0] * layer + ALLOWED[1]
    print(f"peak {format_size(max(peaks))}, allowed {format_size(allowed)} "
          f"({ALLOWED[0]} layers + {format_size(ALLOWED[1])}); "
          f"the largest is {max(peaks) / min(peaks):.2f} x the smallest")  # fmt: skip
    return 0 if good and max(peaks) <= allowed and max(peaks) <= 1.1 * min(peaks) else 1


def _against(args: argparse.Namespace, ours: dict[str, Any], folder: Path) -> bool:
    """llm-compressor on the model that was just quantized; whether we took a third of its time."""
    tokens = torch.randint(4096, (args.samples, 256))
    save_file({"tokens": tokens}, folder / "tokens.safetensors")
    peer = HERE / "peers" / "llm_compressor.py"
    paths = [folder / "source", folder / "tokens.safetensors", folder / "peer"]
    command = [args.peer, *map(str, [peer, *paths]), "--bits", "4", "--dtype", "bfloat16"]
    command += ["--batch", "1", "--measure-only"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    theirs = json.loads(done.stdout.splitlines()[-1])
    rows = [[name, f"{r['seconds']:.0f}", format_size(r["peak"])]
            for name, r in (("qmoe", ours), ("llm-compressor", theirs))]  # fmt: skip
    tables.show(f"{min(args.layers)} layers, one after the other", ["", "s", "peak memory"], rows)
    ratio = theirs["seconds"] / ours["seconds"]
    print(f"{ratio:.1f} x faster, {theirs['peak'] / ours['peak']:.1f} x less memory")
    return bool(ratio >= 3 and theirs["peak"] > ours["peak"])


def _measure(args: argparse.Namespace, layers: int, folder: Path) -> dict[str, Any]:
    source, quantized = folder / "source", folder / "quantized"
    shape = ["--hidden", args.hidden, "--experts", args.experts, "--layers", layers]
    shape += ["--intermediate", args.intermediate]
    make = [sys.executable, "-P", str(HERE / "random_model.py"), str(source), *map(str, shape)]
    subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
    child = [sys.executable, "-P", __file__, "--samples", str(args.samples)]
    child += ["--preset", args.preset]
    child += ["--child", str(source), str(quantized)]
    done = subprocess.run(child, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _quantize(source: str, quantized: str, preset: str, samples: int) -> dict[str, Any]:
    import qmoe.layer.solve
    import qmoe.pipeline.quantize
    from qmoe import QuantConfig, Scheme
    from qmoe.calibration.routed_tokens import RoutedTokens
    from qmoe.checkpoint.reader import Checkpoint
    from qmoe.layer.at_hand import LayerAtHand
    from qmoe.model.weight_map import WeightMap
    from qmoe.pipeline.output import OutputFolder
    from qmoe.solved.solved_cache import SolvedCache

    spent: Counter[str] = Counter()

    def timed(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.monotonic()
            result = function(*args, **kwargs)
            result = iter(list(result)) if what == "forward" else result
            spent[what] += time.monotonic() - start
            return result

        return run

    WeightMap.load = timed("reading", WeightMap.load)  # type: ignore[method-assign]
    LayerAtHand.run = timed("forward", LayerAtHand.run)  # type: ignore[method-assign]
    qmoe.layer.solve.solve = timed("solving", qmoe.layer.solve.solve)
    RoutedTokens.part = timed("Hessians", RoutedTokens.part)  # type: ignore[method-assign]
    OutputFolder.write_shard = timed("writing", OutputFolder.write_shard)  # type: ignore[method-assign]
    SolvedCache.save = timed("solved cache", SolvedCache.save)  # type: ignore[method-assign]
    Checkpoint.check_finite = timed("checking", Checkpoint.check_finite)  # type: ignore[method-assign]
    scheme = Scheme(4, 128)
    text = {"samples": samples, "self_samples": 0, "seqlen": 256, "batch": 8}
    config = QuantConfig.preset(preset, experts=scheme, dense=scheme, **text)
    start = time.monotonic()
    qmoe.pipeline.quantize.quantize(source, quantized, config)
    seconds = time.monotonic() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "spent": dict(spent)}


if __name__ == "__main__":
    sys.exit(main())
