"""EXL3's own recipe, restated from exllamav3 1.6.5's converter, in qmoe's pipeline and codes.

    python -P scripts/peers/exl3_recipe.py MODEL DST --format exl3 ...

What is its own: scales that make outputs, and then inputs, equal in size; inputs from the last to
the first; tiles searched under plain squared errors, at the scale that is best for tiles alone. Its
other settings are options (methods.py): every expert sees all tokens of its layer, without routing
weights, and a damping of 0.025. Left out: its output Hessians. A search with 1024 survivors stands
for its search of all states, which takes days on a CPU.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python -P` leaves it out

import ours
import torch
from torch import Tensor

from qmoe.format.hadamard import rotate
from qmoe.format.trellis import BLOCK
from qmoe.kernels.cpu.encode import encode
from qmoe.layer import statistics
from qmoe.solvers import trellis


def scales_of(W: Tensor, energy: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sizes of outputs, and of inputs once outputs are scaled and rotated, with random signs."""
    generator = torch.Generator().manual_seed(trellis.SEED)
    signs = [torch.randint(0, 2, (size,), generator=generator) * 2.0 - 1 for size in W.shape[1:]]
    rows = trellis._even(W.square().mean(2).sqrt()) * signs[0]
    turned = rotate((W / rows[..., None]).mT, BLOCK)
    return rows, trellis._even(turned.square().mean(2).sqrt()) * signs[1]


def order(H: Tensor) -> Tensor:
    """Blocks of 16 inputs from the last to the first."""
    blocks = torch.arange(H.shape[1]).unflatten(0, (-1, trellis.SIDE)).flip(0)
    return blocks.flatten().expand(len(H), -1)


def plain(*given: Any, metric: Tensor) -> tuple[Tensor, Tensor]:
    return encode(*given)


def share_of(rate: float, fed_back: bool) -> float:
    return real_share(rate, fed_back=False)


real_share = trellis.share_of
for name, made in {
    "scales_of": scales_of, "_order": order, "encode": plain, "share_of": share_of,
}.items():  # fmt: skip
    assert hasattr(trellis, name)
    setattr(trellis, name, made)
statistics.SAMPLE = 1 << 20  # what experts borrow from: all tokens of the layer

if __name__ == "__main__":
    sys.exit(ours.quantize(sys.argv[1:]))
