"""Block types of ggml on processors."""
