"""Bits for a number of bytes: measured once, allocated for any budget, proved against uniform."""
