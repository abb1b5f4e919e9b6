"""The spec: sections, parsing, checks, names of other trainers."""
