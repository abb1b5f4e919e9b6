"""Every patch of megatron-core 0.19.2 and torch, and every warning of theirs that is silenced.

Each function names the line that makes it necessary, so that an upgrade of Megatron shows what may go. `noise` is read
before Megatron is imported.
"""
