"""The steps of scripts/gpu_check.py; bench_kernels.py and tune_kernels.py share them."""
