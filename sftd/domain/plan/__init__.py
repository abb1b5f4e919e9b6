"""What a run costs before it is submitted: memory, time, disk."""
