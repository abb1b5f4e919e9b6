"""A module for each model family, named for the `model_type` of its entry in `domain/model/families.py`: its FAMILY."""
