"""One decoder layer: statistics of its matrices, solving, refitting, tuning, what is kept of it."""
