"""Rotating a model's residual stream: whether it can be, and doing it."""
