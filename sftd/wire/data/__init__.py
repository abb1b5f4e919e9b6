"""Data files as both processes read them."""
