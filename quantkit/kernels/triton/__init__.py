"""Kernels for GPUs.

Triton launches on the current device, wherever the tensors are: so every launch lies in ``with device_of(tensor)``,
which takes a microsecond.
"""
