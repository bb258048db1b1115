"""Solvers: functions from weight stacks and statistics to `Quantized`. They never see a model."""
