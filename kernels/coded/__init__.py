"""EXL3's codes on a GPU: their bytes, whole layers, custom ops, and what a model holds."""
