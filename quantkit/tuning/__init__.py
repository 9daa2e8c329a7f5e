"""Tuning of a whole layer by gradients: codes, scales and norms, after a method has chosen them."""
