"""What a model is: shape, parameters, FLOPs, files."""
