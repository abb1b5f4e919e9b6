"""A layer's experts computed together, by grouped products, on GPUs. On a CPU Megatron computes one expert after the other.

Everything here repeats its bits: `torch.nn.functional.grouped_mm` and the Triton kernels compute each element in one program, in a
fixed order; rows have one place each, so that tokens are spread without sums and collected in the order of their experts; the numbers
of rows are sums of integers. Nothing here waits for the device; with expert parallelism Megatron's dispatcher does, for the sizes
of what it sends. In FP32, or on a GPU older than Hopper, PyTorch's grouped_mm is a loop, which waits.
"""
