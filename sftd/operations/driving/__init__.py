"""What a daemon writes while it drives attempts."""
