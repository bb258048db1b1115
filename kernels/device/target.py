"""The architectures that kernels are compiled and checked for."""

# NVIDIA by compute capability, AMD by name.
ARCHITECTURES = (
    "sm80", "sm86", "sm89", "sm90", "sm100", "sm120", "gfx942", "gfx1100", "gfx1201",
)  # fmt: skip
