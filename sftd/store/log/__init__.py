"""Events, and the state that is folded from them: runs, curves, goodput."""
