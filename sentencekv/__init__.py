"""Long-context decoding for Hugging Face causal language models."""
