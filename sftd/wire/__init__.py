"""The contract between the daemon and the trainer: files of an attempt, journal, specs and data as both read them."""
