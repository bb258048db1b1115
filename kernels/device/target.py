"""The architectures that kernels are compiled and checked for, and what they want."""

from typing import Literal

# K orders of stored bytes (layout.py). plain: column order, for tcgen05 and AMD. mma: mma.sync.
# wgmma: sm_90.
Order = Literal["plain", "mma", "wgmma"]
# NVIDIA by compute capability, AMD by name.
ARCHITECTURES = (
    "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100", "gfx1201",
)  # fmt: skip
