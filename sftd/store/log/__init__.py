"""Events, and what is folded from them: runs, curves, goodput."""
