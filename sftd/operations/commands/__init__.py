"""Commands of users: each function writes."""
