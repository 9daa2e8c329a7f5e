"""Compiled code. Only speed lives here: each kernel has a twin in plain torch, which says what it computes."""
