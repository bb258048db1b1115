"""Packed experts and linears on a CPU, computed by the C kernels in csrc/.

Import the module you need; this one loads nothing. library.py finds and calls the shared object,
layout.py packs matrices for it, ops.py makes torch ops of it, stack.py is what a model holds, and
cache.py keeps the layout in a file.
"""
