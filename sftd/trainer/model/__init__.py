"""The model on Megatron-core."""
