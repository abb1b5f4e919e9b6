"""Triton kernels for what stands between a layer's matrix products (`ops.py` says where), and deterministic attention.

Each of Triton's computes in FP32 whatever the dtype of its tensors, and is deterministic: no kernel adds atomically. They are
imported only where there is a GPU.
"""
