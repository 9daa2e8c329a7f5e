"""Block types of ggml."""
