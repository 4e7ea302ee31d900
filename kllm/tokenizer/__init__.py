"""Text to tokens: training a tokenizer, using anybody's, and encoding conversations."""
