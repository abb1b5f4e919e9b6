"""The secrets of an environment, kept as digests: enough to find them in a text, too little to read them.

Whoever reads what an attempt printed may have another environment than its ranks had: the daemon that adopted it, or a person
who imports it.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

_NAMES = ("PASSWORD", "PASSWD", "TOKEN", "SECRET", "KEY", "CREDENTIAL")
# Shorter values are words that occur anywhere.
_SHORTEST = 8
# The file may be a stranger's.
_MOST = 1000
_URL_PASSWORD = re.compile(r"(//[^/@:\s]*:)[^@\s]+@")


class Secret(msgspec.Struct, frozen=True):
    """A value: its first character and length, which say where to look, and its salted sha256."""

    first: str
    length: int
    digest: str


class Secrets(msgspec.Struct, frozen=True):
    """The secrets of an environment."""

    salt: str
    secrets: list[Secret]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Secrets:
        """The values of variables whose names say that they are secret, the longest first. One that is not text, whose bytes are
        lone surrogates here, is left out: no text holds it."""
        salt = os.urandom(16).hex()
        values = {
            value
            for name, value in environ.items()
            if len(value) >= _SHORTEST
            and any(word in name.upper() for word in _NAMES)
            and value == value.encode(errors="replace").decode()
        }
        ordered = sorted(values, key=lambda value: (-len(value), value))
        return cls(salt, [Secret(value[0], len(value), _digest(salt, value)) for value in ordered])

    @classmethod
    def read(cls, path: Path) -> Secrets | None:
        """Those that were written to a file; None when it is not there or cannot be read."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return None
        usable = [s for s in found.secrets[:_MOST] if len(s.first) == 1 and s.length >= _SHORTEST]
        return cls(found.salt, usable)

    def hide(self, text: str) -> str:
        """The text with *** in the place of each secret, and of a password in a URL."""
        for secret in self.secrets:
            text = "".join(self._parts(text, secret))
        return _URL_PASSWORD.sub(r"\1***@", text)

    def _parts(self, text: str, secret: Secret) -> Iterator[str]:
        kept = at = 0
        while (at := text.find(secret.first, at)) != -1 and at + secret.length <= len(text):
            if _digest(self.salt, text[at : at + secret.length]) == secret.digest:
                yield text[kept:at] + "***"
                kept = at = at + secret.length
            else:
                at += 1
        yield text[kept:]


def _digest(salt: str, value: str) -> str:
    return hashlib.sha256(f"{salt}{value}".encode(errors="replace")).hexdigest()
