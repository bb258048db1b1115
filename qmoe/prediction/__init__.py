"""Layers that predict a token beyond the next."""
