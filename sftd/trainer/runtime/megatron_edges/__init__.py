"""All patches of megatron-core 0.19.2 and torch, and all of their warnings that are silenced.

Each function names the line that makes it necessary, so that an upgrade of Megatron shows which patches can go. `noise`
runs before Megatron is imported.
"""
