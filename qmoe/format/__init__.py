"""The numbers of a quantized matrix: grids, packed words, rotations, the checkpoint format."""
