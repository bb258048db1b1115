"""qmoe's plugin for vLLM: packed checkpoints run through qmoe's kernels inside vLLM."""
