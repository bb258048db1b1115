"""A finished folder in another engine's file: GGUF for llama.cpp, without rounding again."""
