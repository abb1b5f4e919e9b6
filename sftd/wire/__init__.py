"""The contract between the daemon and the trainer: the files of an attempt, the journal, specs and data."""
