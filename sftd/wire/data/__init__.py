"""Data files, as the daemon and the trainer read them."""
