"""Block types of ggml on GPUs."""
