"""How fast this machine reads memory, to hold decoding against."""

import time

import torch

BUFFER, SLICE = 1 << 28, 1 << 24  # bytes: of memory that no cache holds, and read at once
SLICES = 8


class ReadBandwidth:
    """Measures the bytes per second that torch's threads read from memory, a little at a time, so
    that it can take turns with what it is compared with."""

    def __init__(self) -> None:
        self._parts = torch.ones(BUFFER // 4).split(SLICE // 4)
        self._at = 0
        self.best = 0.0

    def measure(self) -> float:
        """Read some slices; the best so far, in bytes per second. A slice takes about as long as a
        decoded token, and other work on the machine only takes time away."""
        for _ in range(SLICES):
            part = self._parts[self._at % len(self._parts)]
            self._at += 1
            start = time.perf_counter()
            torch.dot(part, part)
            self.best = max(self.best, part.nbytes / (time.perf_counter() - start))
        return self.best
