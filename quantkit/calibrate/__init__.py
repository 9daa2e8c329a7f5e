"""What the model sees: text as rows of tokens, hidden states between layers, and the inputs of each linear."""

from quantkit.calibrate.documents import builtin_dir

__all__ = ["builtin_dir"]
