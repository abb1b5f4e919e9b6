"""One module per model family, named like the `model_type` of its entry in `domain/model/families.py`. It defines FAMILY.

`seam` defines the type of FAMILY, `rules` the entries of its table of weights.
"""
