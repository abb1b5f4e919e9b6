"""A layer's experts computed together, by grouped products, on GPUs. On a CPU Megatron computes one expert after the other."""
