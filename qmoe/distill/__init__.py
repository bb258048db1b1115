"""Distilling a solved model against the original's predictions."""
