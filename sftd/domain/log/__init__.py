"""The log: events, their JSON, moments of it."""
