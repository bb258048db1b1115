"""A run of `qmoe quantize`: its checks, the pass over the layers, the folder that it writes."""
