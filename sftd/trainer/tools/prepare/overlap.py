"""Finds chats that occur again: among those of the sources, and in validation data. Keeps 8-byte hashes, never text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftd.trainer.chat.errors import ChatError, PrepareError
from sftd.trainer.chat.rows import Conversation, conversation
from sftd.trainer.chat.shapes import RowKeys
from sftd.trainer.tools.prepare.sources.chat_files import ChatSource, open_source, pieces, rows_of
from sftd.trainer.tools.prepare.tokenize_pieces import Row

# Maximum number of rows as examples.
_EXAMPLES = 5
# Reasons for which training rows are left out.
REPEATS = "it repeats an earlier chat"
OVERLAPS = "the validation data has its chat or its prompt"


class Repeats:
    """Recognises chats that repeat an earlier one by their normalised text."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()
        self._place = ""
        self._repeats = False

    def __contains__(self, row: Row) -> bool:
        """Whether the row's chat repeats an earlier one. The rows of a chat come one after another."""
        if row.place != self._place:
            self._place, self._repeats = row.place, row.loose in self._seen
            self._seen.add(row.loose)
        return self._repeats


class Overlap:
    """Compares training rows with validation rows, by normalised text and by the user's messages alone."""

    def __init__(self) -> None:
        self._chats: set[bytes] = set()
        self._prompts: set[bytes] = set()
        self._train = bytearray()

    def hold_out(self, chat: bytes, prompt: bytes) -> None:
        """Add a chat of the validation data by its `loose_key` and `prompt_key`."""
        self._chats.add(chat)
        self._prompts.add(prompt)

    def train(self, row: Row) -> None:
        """Add the next training row."""
        self._train += row.loose + row.prompt

    def __contains__(self, row: Row) -> bool:
        """Whether the validation data so far has the row's chat or its prompt."""
        return row.loose in self._chats or row.prompt in self._prompts

    def found(self) -> tuple[int, int, list[int]]:
        """(training rows whose chat the validation data has, others whose prompt it has, the first of both, from 0)."""
        same = asked = 0
        rows: list[int] = []
        for row in range(len(self._train) // 16):
            chat, prompt = (bytes(self._train[at : at + 8]) for at in (16 * row, 16 * row + 8))
            is_same, is_asked = chat in self._chats, prompt in self._prompts
            same += is_same
            asked += is_asked and not is_same
            if (is_same or is_asked) and len(rows) < _EXAMPLES:
                rows.append(row)
        return same, asked, rows


def hold_out_files(overlap: Overlap, paths: Sequence[Path], keys: RowKeys) -> list[ChatSource]:
    """Add the chats of files, or the questions of an evaluation: rows with a prompt and no answer. Raises PrepareError."""
    sources = [open_source(path) for path in paths]
    for source in sources:
        for piece in pieces(source, keys):
            for place, row in rows_of(piece):
                try:
                    if isinstance(row, ChatError):
                        raise row
                    chat = _chat(row, keys)
                except (ChatError, RecursionError) as error:
                    raise PrepareError(
                        f"{place}: {error}. Remove the row or the file from --against."
                    ) from error
                overlap.hold_out(chat.loose_key(), chat.prompt_key())
    return sources


def _chat(row: Any, keys: RowKeys) -> Conversation:
    try:
        return conversation(row, keys)
    except ChatError:
        asked = row.get("prompt") or row.get("messages") if isinstance(row, dict) else None
        if not asked:
            raise
        return conversation({"prompt": asked, "completion": "?"})
