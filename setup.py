"""The CPU kernels in C: an optional extension, left out where no compiler is. All else is in
pyproject.toml. QMOE_PURE=1 leaves it out everywhere, for a wheel that goes with any platform."""

import glob
import os

from setuptools import Extension, setup

# No -ffast-math: it would change the numbers, and at link time those of the whole process.
KERNELS = Extension(
    "qmoe.kernels.cpu._kernels",
    sources=sorted(glob.glob("kernels/cpu/csrc/*.c")),
    depends=sorted(glob.glob("kernels/cpu/csrc/*.h")),
    extra_compile_args=[
        "-std=c11",
        "-O3",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
    ],  # fmt: skip
    extra_link_args=["-lm", "-lpthread"],
    py_limited_api=True,  # it uses nothing of Python's: one file for all versions
    optional=True,
)

if os.environ.get("QMOE_PURE") == "1":
    setup()
else:
    setup(ext_modules=[KERNELS], options={"bdist_wheel": {"py_limited_api": "cp311"}})
