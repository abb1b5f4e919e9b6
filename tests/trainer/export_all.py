"""Run by test_export.py: exports one after the other in one process, and leaves exit codes and messages in a file."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

from sftd.trainer.export.__main__ import main

if __name__ == "__main__":
    outcomes = []
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(argv)
        outcomes.append([code, errors.getvalue()])
    Path(sys.argv[2]).write_text(json.dumps(outcomes))
