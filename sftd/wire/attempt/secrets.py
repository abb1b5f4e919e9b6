"""Digests of the secrets in an environment: they find a secret in a text, but do not reveal it.

They are stored because the process that reads an attempt's output may not have the ranks' environment: a daemon that adopts
the attempt, or `sftd import`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

_NAMES = ("PASSWORD", "PASSWD", "TOKEN", "SECRET", "KEY", "CREDENTIAL")
# Shorter values are too likely to occur in ordinary text.
_SHORTEST = 8
# Limits the work on a file from an untrusted source.
_MOST = 1000
_URL_PASSWORD = re.compile(r"(//[^/@:\s]*:)[^@\s]+@")


class Secret(msgspec.Struct, frozen=True):
    """A secret value: first character and length, to find candidates, and salted sha256."""

    first: str
    length: int
    digest: str


class Secrets(msgspec.Struct, frozen=True):
    """The secrets of an environment."""

    salt: str
    secrets: list[Secret]

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Secrets:
        """The values of variables with secret names, longest first. A value that is not UTF-8 is left out, because no text
        contains its lone surrogates."""
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
        """The secrets in a file; None when it is missing or cannot be read."""
        try:
            found = msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return None
        usable = [s for s in found.secrets[:_MOST] if len(s.first) == 1 and s.length >= _SHORTEST]
        return cls(found.salt, usable)

    def hide(self, text: str) -> str:
        """The text with each secret, and each password in a URL, replaced by ***."""
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
