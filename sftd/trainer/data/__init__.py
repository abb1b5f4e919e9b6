"""From data files to the batches of a step."""
