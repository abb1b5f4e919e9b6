"""A module for each model family, named for the `model_type` of its entry in `domain/model/families.py`, with its FAMILY.

`seam` is what a FAMILY has, `rules` what its table of weights consists of.
"""
