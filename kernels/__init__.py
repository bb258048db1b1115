"""Grouped GEMM over packed experts. Imports nothing: import the module you need.

Imported as `qmoe.kernels`. The version below matters only when the repository root is on sys.path:
transformers then takes this folder for Hugging Face's `kernels` and compares its version.
"""

__version__ = "0"
