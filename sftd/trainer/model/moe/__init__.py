"""Mixtures of experts: the router, the experts and what Megatron needs to know of them."""
