"""The loop: attempt, steps, validation, samples."""
