"""Mixtures of experts: router, losses and load, experts."""
