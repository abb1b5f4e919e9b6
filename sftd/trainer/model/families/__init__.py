"""Weights and layers of the model families: those of Llama's relatives in `rules`; a family with layers of its own has a module,
named like the `model_type` of its entry in `domain/model/families.py`, that defines FAMILY (`seam` says what it is)."""
