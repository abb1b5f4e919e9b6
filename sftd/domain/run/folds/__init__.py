"""The fold, by feature: evaluations, files, stops."""
