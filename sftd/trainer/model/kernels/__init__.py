"""Triton kernels for the operations between a layer's matrix products (see `ops.py`), and deterministic attention.

The Triton kernels compute in FP32 for any dtype and are deterministic: none adds atomically. Import them only on a
machine with a GPU.
"""
