"""The gated delta net (Yang et al. 2025, "Gated Delta Networks"), which Qwen3-Next and Qwen3.5 have in most of their layers.

`segments` orders tokens by chunk, `rule` computes the recurrence in chunks, `net` is the module of the layer spec.
"""
