"""Whether a run may be queued: the facts that submit reads, their rules, and the judge."""
