"""Gated activations that run in the epilogue of the first product, in float32."""

import triton
import triton.language as tl

# What `gated` knows; anything else runs unfused.
FUSED = ("silu", "gelu", "gelu_tanh", "clamped_swiglu")


@triton.jit
def gated(gate, up, alpha, limit, ACT: tl.constexpr):
    """activation(gate) * up.

    clamped_swiglu is gpt-oss's: gate at most `limit`, up within +-limit, gate * sigmoid(alpha *
    gate) * (up + 1). alpha and limit are read by it alone.
    """
    if ACT == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACT == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh(z) = 2 sigmoid(2 z) - 1
        return gate * tl.sigmoid(2.0 * inner) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return gate * tl.sigmoid(alpha * gate) * (up + 1.0)
