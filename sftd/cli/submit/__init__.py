"""`sftd prepare` and `sftd submit`: from chats to a queued run."""
