"""Removal of credentials from URLs in texts."""

from __future__ import annotations

import re

# A password may contain an unquoted slash or @, so it extends to the last @ of the word.
_CREDENTIALS = re.compile(r"//(?:[^/@:\s]*:\S*@|[^/@\s]*@)")
# libpq accepts secrets as query parameters too.
_SECRET_PARAMETER = re.compile(r"([?&]\w*pass\w*=)[^&\s]*", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """The text without users and passwords in its URLs."""
    return _SECRET_PARAMETER.sub(r"\1***", _CREDENTIALS.sub("//", text))
