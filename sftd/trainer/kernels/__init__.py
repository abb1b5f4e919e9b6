"""Triton kernels for what stands between a layer's matrix products. Imported only where there is a GPU: see `ops.py`.

Each computes in FP32 whatever the dtype of its tensors, and is deterministic: no kernel adds atomically.
"""
