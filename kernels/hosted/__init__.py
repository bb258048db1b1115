"""Experts in host memory: copied to slots on the GPU, or computed by the CPU beside it."""
