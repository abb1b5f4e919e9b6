"""Text that a terminal only shows: whoever wrote it, it moves no cursor, sets no title, hides nothing and turns nothing round."""

from __future__ import annotations

import re

# Control characters but for newline and tab, line and paragraph separators, bidirectional embeddings, overrides and isolates,
# annotations, invisible tags, and halves of characters that no encoding takes. Of escape sequences, those that only set a
# colour or a weight are left, for they are ours as well; 8 among their numbers conceals.
_OBEYED = re.compile(
    "\x1b(?!\\[(?!(?:[0-9]*[;:])*0*8[;:m])[0-9;:]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """A text of one line without anything that is not printed: spaces are in its place."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def harmless(text: str) -> str:
    """A text of several lines in which spaces are in the place of what a terminal obeys, colours excepted."""
    # Ten thousand lines that have nothing of it are looked through at once.
    return text if text.replace("\n", "").isprintable() else _OBEYED.sub(" ", text)


def escaped(json: str) -> str:
    """JSON in which what a terminal obeys is escaped: the same values."""
    return json if json.isascii() and "\x7f" not in json else _OBEYED.sub(_escape, json)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
