"""Calibration text, token batches and routed-token statistics. Imports nothing; see the modules.

Imported as `qmoe.calibration`.
"""
