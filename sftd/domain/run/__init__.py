"""The state of a run, folded from its events, and the decisions made on it."""
