"""Process groups, devices, journal, patches of Megatron and torch."""
