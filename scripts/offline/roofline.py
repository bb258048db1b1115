"""What a layer costs at decode on a GPU that is not here: bytes, instructions, products, launches.

Every figure that comes out of this file is a PROJECTION: a lower bound from data-sheet rates and
counted instructions, without latency, bank conflicts, clocks or tails. It is no measurement.
"""

from dataclasses import dataclass

from qmoe.kernels.layout import count_planes, padded_rows

LAUNCH_SECONDS = 3e-6  # between kernels of one stream, inside a CUDA graph less


@dataclass(frozen=True)
class Gpu:
    """Data-sheet figures: bytes/s of memory, multiprocessors, boost clock (Hz), dense fp16 products
    with fp32 sums (FLOP/s). Four instructions of 32 lanes are issued per multiprocessor and clock.
    """

    name: str
    arch: str
    bandwidth: float
    multiprocessors: int
    clock: float
    flops: float


GPUS = (
    Gpu("RTX 3090", "sm86", 936e9, 82, 1.70e9, 71e12),
    Gpu("RTX 4090", "sm89", 1008e9, 128, 2.52e9, 165e12),
    Gpu("RTX 5090", "sm120", 1792e9, 170, 2.41e9, 210e12),
    Gpu("A100 80G", "sm80", 2039e9, 108, 1.41e9, 312e12),
    Gpu("H100 SXM", "sm90", 3350e9, 132, 1.83e9, 989e12),
)


@dataclass(frozen=True)
class Layer:
    """The routed experts of a model's layer: E experts, A per token, hidden size H, intermediate I,
    group along K."""

    name: str
    E: int
    A: int
    H: int
    I: int  # noqa: E741
    group: int = 128


LAYERS = (
    Layer("Mixtral-8x7B", 8, 2, 4096, 14336),
    Layer("Qwen3-30B-A3B", 128, 8, 2048, 768),
    Layer("DeepSeek-V3", 256, 8, 7168, 2048),
    Layer("DeepSeek-V2-Lite", 64, 6, 2048, 1408),
    Layer("gpt-oss-20b", 32, 4, 2880, 2880, 64),
    Layer("gpt-oss-20b", 32, 4, 2880, 2880, 32),
)


@dataclass(frozen=True)
class Traffic:
    """Bytes one decoded token moves through memory, and the least any layout could move."""

    moved: int
    ideal: float
    weights: int

    @property
    def ratio(self) -> float:
        return self.moved / self.ideal


def traffic(layer: Layer, bits: int, zero: bool, split: int) -> Traffic:
    """One token through A experts. ideal: packed integers, scales, zero points of their own width,
    x once and y once. moved: whole tiles of rows and byte planes of columns, a byte per zero point,
    and every intermediate written and read back."""
    moved, ideal, weights = 0, 0.0, 0
    for n, k in ((2 * layer.I, layer.H), (layer.H, layer.I)):
        groups = -(-k // layer.group)
        rows = padded_rows(n)
        moved += layer.A * rows * (count_planes(k, bits) * 32 + groups * (2 + zero))
        ideal += layer.A * n * (k * bits / 8 + groups * (2 + zero * bits / 8))
        weights += layer.A * n * k
    x = y = 2 * layer.H
    between = 2 * (2 * layer.A * layer.I)  # fp16 activations, written and read
    parts = 2 * (4 * split * layer.A * layer.H)  # fp32 contributions, written and read
    return Traffic(moved + x + y + between + parts, ideal + x + y, weights)


def projected_seconds(
    gpu: Gpu, traffic: Traffic, per_weight: float, BM: int, launches: int
) -> dict[str, float]:
    """The bounds of one layer and one token; "total" is their maximum plus the launches."""
    bounds = {
        "memory": traffic.moved / gpu.bandwidth,
        "issue": traffic.weights * per_weight / (gpu.multiprocessors * 4 * 32 * gpu.clock),
        "products": 2 * traffic.weights * BM / gpu.flops,
    }
    return bounds | {"total": max(bounds.values()) + launches * LAUNCH_SECONDS}
