"""Models: the default one, and conversion to GGUF."""
