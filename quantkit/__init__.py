"""quantkit: quantise Mixture-of-Experts checkpoints far larger than memory, layer by layer, expert by expert."""

__version__ = "0.1.0"
