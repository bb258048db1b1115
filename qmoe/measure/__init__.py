"""Measuring models: perplexity and KL, speed and memory, baselines, the matrix of families."""
