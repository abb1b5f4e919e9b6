"""Starting attempts: spec → torchrun's command and environment, processes and their identity, device inventory."""
