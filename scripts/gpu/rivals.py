"""What else can compute a layer of routed experts on this GPU, on random weights of its shape."""

from collections.abc import Callable

import torch
from offline.rivals import byte_per_nibble
from offline.roofline import Layer
from torch import Tensor

from qmoe.kernels import launch
from qmoe.kernels.activation import Activation
from qmoe.kernels.grouped import place, sum_parts
from qmoe.kernels.layer import device_table

SILU = Activation("silu")
Run = Callable[[Tensor, Tensor, Tensor], Tensor]
# Those whose launches a CUDA graph can hold: they read nothing back to the host.
GRAPHS = ("qmoe", "bf16", "plain loop")


def rivals(
    layer: Layer, bits: int | tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> dict[str, Run]:
    """By name, the 16-bit one among them only if its weights fit twice."""
    found: dict[str, Run] = {}
    size = dtype.itemsize * layer.E * 3 * layer.H * layer.I
    if device.type == "cuda" and 3 * size > torch.cuda.mem_get_info(device)[0]:
        return found
    shapes = (layer.E, 2 * layer.I, layer.H), (layer.E, layer.H, layer.I)
    first, second = (torch.randn(s, device=device, dtype=dtype) * 0.02 for s in shapes)
    found["bf16"] = lambda x, ids, gates: grouped_16_bits(x, ids, gates, first, second)
    if bits == 4:
        found |= nf4(first, second) | plain_loop(layer, dtype, device) | vllm_triton(layer, device)
    return found


def grouped_16_bits(x: Tensor, ids: Tensor, gates: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """torch's grouped product on 16-bit weights, as transformers runs it ("grouped_mm" of its
    integrations/moe.py, 5.17): sort, two products, back in order, sum."""
    T, A = ids.shape
    sorted_ids, order = torch.sort(ids.flatten())
    kind = torch.float32 if x.device.type == "cpu" else torch.int32  # what histc takes there
    counts = torch.histc(sorted_ids.to(kind), bins=len(first), min=0, max=len(first) - 1)
    ends = counts.cumsum(0, dtype=torch.int32)
    product = torch.nn.functional.grouped_mm
    mid = SILU(product(x[order // A], first.transpose(1, 2), offs=ends))
    out = product(mid, second.transpose(1, 2), offs=ends) * gates.flatten()[order, None].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return out[back].view(T, A, -1).sum(1)


def nf4(first: Tensor, second: Tensor) -> dict[str, Run]:
    """bitsandbytes, expert by expert; nothing where it is not installed."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return {}
    from qmoe.kernels.moe import moe_forward
    from qmoe.measure.baselines import Nf4Stack

    packed = Nf4Stack(first), Nf4Stack(second)
    return {"nf4": lambda x, ids, gates: moe_forward(x, ids, gates, *packed, SILU)}


def plain_loop(layer: Layer, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """The byte-per-nibble loop that kernels/offline counts, with our schedule around it."""
    BM, BN, BK = 16, 128, min(layer.group, 64)

    def words(n: int, k: int) -> Tensor:
        return torch.randint(0, 256, (layer.E, n, k // 2), dtype=torch.uint8, device=device)

    def scales(n: int, k: int) -> Tensor:
        return torch.full((layer.E, n, k // layer.group), 0.002, dtype=dtype, device=device)

    shapes = (2 * layer.I, layer.H), (layer.H, layer.I)
    if any(n % BN or k % BK for n, k in shapes):  # the loop has no masks
        return {}
    weights = [(words(*s), scales(*s)) for s in shapes]

    def product(
        x: Tensor, per_token: int, order: Tensor, tiles: Tensor, P: int, which: int
    ) -> Tensor:
        w, s = weights[which]
        n, k = shapes[which]
        out = x.new_empty(P, n)
        byte_per_nibble[(len(tiles) - 1, n // BN)](
            x, w, s, out, order, tiles, k, P, per_token, x.stride(0), w.stride(1), s.stride(1),
            out.stride(0), w.stride(0), s.stride(0), BM=BM, BN=BN, BK=BK, GROUP=layer.group,
            num_warps=4, num_stages=3,
        )  # fmt: skip
        return out

    def run(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        flat = ids.flatten()
        most = launch.most_tiles(len(flat), layer.E, BM)
        order, tiles = place(flat, layer.E, BM, most)
        mid = SILU(product(x, ids.shape[1], order, tiles, len(flat), 0))
        out = product(mid, 1, order, tiles, len(flat), 1) * gates.flatten()[:, None].to(x.dtype)
        y = torch.empty_like(x)
        sum_parts(out[None], flat, y, layer.E, device_table(x.device)[0])
        return y

    return {"plain loop": run}


def vllm_triton(layer: Layer, device: torch.device) -> dict[str, Run]:
    """vLLM's Triton int4 experts, if vLLM is installed; its interface is that of 2026."""
    try:
        from vllm.model_executor.layers.fused_moe import fused_experts
        from vllm.model_executor.layers.fused_moe.config import int4_w4a16_moe_quant_config
    except ImportError:
        return {}

    def words(n: int, k: int) -> Tensor:
        return torch.randint(0, 256, (layer.E, n, k // 2), dtype=torch.uint8, device=device)

    def scales(n: int, k: int) -> Tensor:
        shape = (layer.E, n, k // layer.group)
        return torch.full(shape, 0.002, dtype=torch.bfloat16, device=device)

    first, second = (2 * layer.I, layer.H), (layer.H, layer.I)
    w1, w2 = words(*first), words(*second)
    config = int4_w4a16_moe_quant_config(
        w1_scale=scales(*first),
        w2_scale=scales(*second),
        w1_zp=None,
        w2_zp=None,
        block_shape=[0, layer.group],
    )

    def run(x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
        return fused_experts(x, w1, w2, topk_weights=gates, topk_ids=ids.int(), quant_config=config)

    return {"vllm": run}
