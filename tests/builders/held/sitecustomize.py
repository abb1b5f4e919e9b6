"""Stops a trainer at a line of its journal, by its own hand: on a machine of any speed it gets no further. Where the folder
that HOLDS names has a file `traced`, it also records each fsync and rename there (tests/builders/durability.py).

Python imports this by itself where its folder is in PYTHONPATH. `tests/builders/holds.py` says at which line, in a file of the folder
that HOLDS names; HOLD_AT says it to whichever attempt is started with it. Where WARM names a server, a process whose imports
take long is first replaced by a fork of that (tests/builders/warm_client.py).
"""

from __future__ import annotations

import os

if "IS_FORKED" not in globals() and (server := os.environ.get("WARM")):
    from tests.builders.warm_client import replace_if_asked

    replace_if_asked(server)

if folder := os.environ.get("HOLDS"):
    import json
    import signal
    from typing import Any

    _write = os.write

    def _write_and_stop(fd: int, data: Any, /) -> int:
        written = _write(fd, data)
        if b'"type":"' in data[:64]:
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith("/journal"):
                _stop_if_asked(path, json.loads(data))
        return written

    def _stop_if_asked(path: str, line: dict[str, Any]) -> None:
        *_, run, attempt, _ = path.split("/")
        hold = f"{folder}/{run}.{attempt}"
        try:
            with open(hold) as file:
                wanted = file.read()
        except FileNotFoundError:
            wanted = os.environ.get("HOLD_AT", "")
        if not wanted:
            return
        kind, step = wanted.split()
        if line["type"] == kind and line["p"]["step"] >= int(step):
            with open(f"{hold}.held", "w") as file:
                file.write(str(os.getpid()))
            # Once: after a resume it must not stop at the next line.
            if os.environ.pop("HOLD_AT", None) is None:
                os.unlink(hold)
            os.kill(os.getpid(), signal.SIGSTOP)

    vars(os)["write"] = _write_and_stop

    from tests.builders.durability import observe

    observe(f"{folder}/traced", lambda: os.path.exists(f"{folder}/traced"))
