"""Triton device code. Imports nothing but triton, so it compiles with any Triton, without torch."""
