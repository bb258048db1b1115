"""bitsandbytes NF4 in blocks of 64, applied to each matrix.

bitsandbytes replaces linears only and leaves fused experts in 16 bits; here every expert's matrix
goes through its functions, so the row says what NF4 loses and not what the library forgets. Needs
no calibration text. Runs in the environment of qmoe.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from common import arguments, cpu_seconds, hand_back, source_tensors, to_quantize, versions

BLOCK = 64


def main() -> None:
    args = arguments(__doc__).parse_args()
    source = source_tensors(args.model)
    weights, stored = {}, 0
    before = cpu_seconds()
    for name in to_quantize(source):
        packed, state = quantize_4bit(source[name], blocksize=BLOCK, quant_type="nf4")
        weights[name] = dequantize_4bit(packed, state)
        stored += packed.nbytes + state.absmax.nbytes
    seconds = cpu_seconds() - before
    hand_back(args.model, args.out, weights, stored, {
        "versions": versions("bitsandbytes"),
        "settings": {"quant_type": "nf4", "blocksize": BLOCK},
        "cpu_seconds": seconds,
        "fallbacks": [],
        "notes": ["not calibrated"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
