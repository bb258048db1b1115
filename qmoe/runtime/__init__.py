"""Packed weights inside a transformers model: how it holds them and runs on them."""
