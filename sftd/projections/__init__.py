"""Views folded from events: they can be deleted and rebuilt, and say the same."""
