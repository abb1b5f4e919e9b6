"""Checks at submit: the facts that submit reads, their rules, and the judge."""
