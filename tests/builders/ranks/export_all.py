"""Run by test_export.py and test_prove.py: exports (or another tool, if named) one after the other in one process, and leaves
exit codes and messages in a file, and a trace of each fsync beside it."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))

from tests.builders.durability import observe

if __name__ == "__main__":
    observe(f"{sys.argv[2]}.trace")
    main = importlib.import_module(f"sftd.trainer.tools.export.{[*sys.argv, '__main__'][3]}").main
    outcomes = []
    for argv in json.loads(Path(sys.argv[1]).read_text()):
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(argv)
        outcomes.append([code, errors.getvalue()])
    Path(sys.argv[2]).write_text(json.dumps(outcomes))
