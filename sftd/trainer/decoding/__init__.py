"""Answers of many prompts at once, and the likelihoods of given answers."""
