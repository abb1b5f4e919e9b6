"""Terminal output: formats, tables, plots, and the filter for control characters."""
