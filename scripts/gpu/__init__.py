"""The steps of scripts/gpu_check.py, and what bench_kernels.py and tune_kernels.py share with it."""
