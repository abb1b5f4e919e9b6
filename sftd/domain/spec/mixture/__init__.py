"""Mixtures of sources: `data.sources` and `data.stages`."""
