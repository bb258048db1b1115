"""What a quantized model takes: bytes of weights, cache and activations, before there is one."""
