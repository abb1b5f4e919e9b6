"""Triton kernels for the operations between a layer's matrix products (see `ops.py`), and deterministic attention.

Each of Triton's computes in FP32 whatever the dtype of its tensors, and is deterministic: no kernel adds atomically. They are
imported only where there is a GPU.
"""
