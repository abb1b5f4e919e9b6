"""Errors of the preparation tools."""


class PrepareError(Exception):
    """A mistake or a lack that the user can fix.

    The message says what is wrong, where, and what to do about it; the tool prints it alone on
    standard error and ends with exit code 2.
    """


class ChatError(Exception):
    """One conversation cannot be used. Whoever knows its file and line raises a PrepareError from it."""
