"""The training process on torch and Megatron-core: `python -m sftd.trainer ATTEMPT_DIR`, one process per rank."""
