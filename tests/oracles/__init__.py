"""Slow textbook versions, written for reading, in float64. The fast code is tested against them."""
