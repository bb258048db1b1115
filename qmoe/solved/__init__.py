"""Solved matrices on disk: until their layer is written, and for other runs."""
