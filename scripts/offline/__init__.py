"""What the kernels compile to, read without a GPU. Needs Triton, not torch."""
