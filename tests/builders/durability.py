"""What a power cut would leave: an observer of fsync and rename, and the judgement of what it saw.

A file is durable under its name when its contents were synced after the last write, when its folder was synced after
the name appeared, and so for each folder that was renamed with it. Page caches make every other order look right.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Of a file: what a later write changes: inode, bytes, ns of the last change.
State = tuple[int, int, int]


def observe(log: str, asked: Callable[[], bool] = lambda: True) -> Callable[[], None]:
    """Have this process append each fsync and each rename of its own to the file `log`, while `asked()`. Returns what
    undoes it."""
    fsync, rename, replace, link, mkdir = os.fsync, os.rename, os.replace, os.link, os.mkdir

    def note(**seen: Any) -> None:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(fd, (json.dumps(seen) + "\n").encode())
        os.close(fd)

    def observed_fsync(fd: Any) -> None:
        fsync(fd)
        if asked():
            path = os.readlink(f"/proc/self/fd/{fd if isinstance(fd, int) else fd.fileno()}")
            note(what="sync", path=path, state=_state(path), holds=_names(path))

    def moving(move: Callable[..., None]) -> Callable[..., None]:
        def moved(source: Any, target: Any, **options: Any) -> None:
            before = _tree(os.fspath(source)) if asked() else {}
            move(source, target, **options)
            if asked():
                note(what="rename", source=os.path.abspath(source), path=os.path.abspath(target), tree=before)

        return moved

    def made(path: Any, *args: Any, **options: Any) -> None:
        mkdir(path, *args, **options)
        if asked():
            note(what="folder", path=os.path.abspath(path))

    vars(os).update(fsync=observed_fsync, mkdir=made)
    vars(os).update(rename=moving(rename), replace=moving(replace), link=moving(link))
    return lambda: vars(os).update(fsync=fsync, rename=rename, replace=replace, link=link, mkdir=mkdir)


def _state(path: str) -> State | None:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def _names(path: str) -> list[str]:
    with contextlib.suppress(NotADirectoryError, FileNotFoundError):
        return sorted(os.listdir(path))
    return []


def _tree(path: str) -> dict[str, dict[str, Any]]:
    """The state of each file and the names in each folder of what is renamed, by path relative to it."""
    if not os.path.isdir(path):
        return {".": {"state": _state(path)}}
    found: dict[str, dict[str, Any]] = {}
    for folder, _, files in os.walk(path):
        found[os.path.relpath(folder, path)] = {"holds": _names(folder)}
        for name in files:
            file = os.path.join(folder, name)
            found[os.path.relpath(file, path)] = {"state": _state(file)}
    return found


@contextlib.contextmanager
def observed(log: Path) -> Iterator[Trace]:
    """This process is observed in the block; the trace may be read meanwhile."""
    undo = observe(str(log))
    try:
        yield Trace(log)
    finally:
        undo()


class Trace:
    """What was observed so far."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def seen(self) -> list[dict[str, Any]]:
        """Every fsync and rename, in order."""
        return list(map(json.loads, self._log.read_text().splitlines())) if self._log.exists() else []

    def syncs(self, path: Path) -> list[State]:
        """The states in which a file was synced."""
        return [tuple(s["state"]) for s in self.seen() if s["what"] == "sync" and s["path"] == str(path)]

    def lacks(self, path: Path) -> list[str]:
        """Why `path`, a file or folder that was put in place by a rename or a link, might not survive a power cut; empty if it would."""
        seen = self.seen()
        places = [i for i, s in enumerate(seen) if s["what"] == "rename" and s["path"] == str(path)]
        if not places:
            return [f"{path.name} was not put in place by a rename"]
        place = places[-1]
        synced = [s for s in seen[:place] if s["what"] == "sync"]
        wrong = [
            f"{name} was not synced after its last {'write' if 'state' in there else 'name'}"
            for name, there in seen[place]["tree"].items()
            if not any(
                s["path"] == os.path.normpath(os.path.join(seen[place]["source"], name))
                and s.items() >= there.items()
                for s in synced
            )
        ]
        if not any(s["what"] == "sync" and s["path"] == str(path.parent) for s in seen[place + 1 :]):
            wrong.append(f"{path.parent.name} was not synced after the rename")
        return wrong

    def unnamed(self, below: Path) -> list[Path]:
        """Folders that were made below a folder, and are there, although the folder that has their name was not synced since."""
        seen = self.seen()
        return [
            path
            for i, made in enumerate(seen)
            if made["what"] == "folder"
            and (path := Path(made["path"])).is_dir()
            and path.is_relative_to(below)
            if not any(s["what"] == "sync" and s["path"] == str(path.parent) for s in seen[i + 1 :])
        ]
