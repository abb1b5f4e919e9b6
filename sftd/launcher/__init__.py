"""Start attempts: torchrun's command and environment, processes and their identity, device inventory."""
