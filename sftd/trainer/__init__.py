"""The training process: torch and Megatron-core behind `python -m sftd.trainer ATTEMPT_DIR`, one process per rank."""
