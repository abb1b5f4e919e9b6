"""Decodes token ids without transformers: `python -m sftd.trainer.tools.row_text FOLDER`, with a model folder's tokenizer.

Reads a JSON list of lists of ids from standard input. Writes JSON lines to standard output, the last one `done` with a
text for each list. Exit codes: 0; 2 with a message on standard error if the folder has no readable tokenizer.json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sftd.trainer.tools.protocol import claim_stdout

_USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Decode and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sftd.trainer.tools.row_text", description="Ids as text.")
    parser.add_argument("folder", type=Path, help="a model folder")
    folder = parser.parse_args(argv).folder
    wanted = json.load(sys.stdin)
    events = claim_stdout()
    # Imports in a fraction of a second; transformers takes several.
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except Exception as error:  # noqa: BLE001  tokenizers raises bare exceptions
        sys.stderr.write(f"{folder}/tokenizer.json cannot be read: {error}\n")
        return _USER_ERROR
    events.emit("done", texts=[tokenizer.decode(ids, skip_special_tokens=False) for ids in wanted])
    return 0


if __name__ == "__main__":
    sys.exit(main())
