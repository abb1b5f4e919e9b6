"""Spec files."""
