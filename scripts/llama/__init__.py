"""llama.cpp as a judge of exported files: its programs, its logits, its own quantization."""
