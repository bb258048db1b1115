"""A model folder on disk: tensors, config, tokenizer, and the model's own code."""
