"""Compiled code for the processor. Only speed lives here: each kernel has a plain torch twin, which says what it
computes."""
