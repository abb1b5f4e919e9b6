"""Makes untrusted text safe for a terminal: it cannot move the cursor, set the title, hide text or change its direction."""

from __future__ import annotations

import re

# Control characters except newline and tab, line and paragraph separators, bidirectional embeddings, overrides and
# isolates, annotations, invisible tags, and surrogates, which cannot be encoded. Escape sequences that only set colour or
# weight are allowed, because sftd's own output uses them; their parameter 8 hides text and is not allowed.
_OBEYED = re.compile(
    "\x1b(?!\\[(?!(?:[0-9]*[;:])*0*8[;:m])[0-9;:]*m)|[\x00-\x08\x0b-\x1a\x1c-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: str) -> str:
    """The text as one line, with a space for each character that is not printable."""
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def harmless(text: str) -> str:
    """A text of several lines, with a space for each control sequence of the terminal except colours."""
    # `isprintable` is a fast path for long texts without control sequences.
    return text if text.replace("\n", "").isprintable() else _OBEYED.sub(" ", text)


def escaped(json: str) -> str:
    """JSON with the terminal's control characters escaped. The values stay the same."""
    return json if json.isascii() and "\x7f" not in json else _OBEYED.sub(_escape, json)


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"
