"""Layers of a model on a CPU as few operations: see docs/architecture/fused.md."""
