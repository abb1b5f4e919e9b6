"""`sftd daemon` and its systemd unit."""
