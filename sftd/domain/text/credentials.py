"""URLs in texts that people read."""

from __future__ import annotations

import re

# A password may hold a slash or an @ that nobody has quoted: it ends at the last @ of the word then.
_CREDENTIALS = re.compile(r"//(?:[^/@:\s]*:\S*@|[^/@\s]*@)")
# libpq takes secrets as parameters, too.
_SECRET_PARAMETER = re.compile(r"([?&]\w*pass\w*=)[^&\s]*", re.IGNORECASE)


def without_credentials(text: str) -> str:
    """A text whose URLs name no user and no password."""
    return _SECRET_PARAMETER.sub(r"\1***", _CREDENTIALS.sub("//", text))
