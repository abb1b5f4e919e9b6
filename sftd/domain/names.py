"""Run ids: short, readable, sayable. `brave-otter-3f2a`."""

from __future__ import annotations

import hashlib
import re

_FIRST = (
    "amber agile azure bold brave bright brisk calm clear clever cosmic crisp deep eager early fair fast fine fleet fresh "
    "gentle glad golden grand green happy honest jolly keen kind light lively lucky lunar mellow merry mighty mild neat noble "
    "polar proud quick quiet rapid ready royal sharp silent silver sleek smart snowy solar steady stout sunny swift tidy vivid "
    "warm wise witty zesty"
).split()
_SECOND = (
    "badger bear beaver bison crane condor cougar coyote deer dingo dolphin dove eagle egret elk falcon ferret finch fox gecko "
    "gibbon goose hare hawk heron ibex ibis jaguar jay koala lark lemur lion llama lynx marmot marten mole moose newt ocelot "
    "orca osprey otter owl panda pika plover puffin puma quail raven robin salmon seal shrew sparrow stork swan tapir tern "
    "tiger toucan trout"
).split()


# What a folder may be called by: one path segment, not hidden, no `..`.
_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def is_run_id(text: str) -> bool:
    """Whether a text may be the id of a run: folders are named by it, so one that came from elsewhere is asked first."""
    return _SAFE.fullmatch(text) is not None


def run_id(random: bytes) -> str:
    """A readable id from 4 random bytes: 64 × 64 names with 16 bits behind them."""
    a, b, c, d = random[:4]
    return f"{_FIRST[a % len(_FIRST)]}-{_SECOND[b % len(_SECOND)]}-{c:02x}{d:02x}"


# A folder of that many bytes leaves room for what is put after it.
_FOLDER_BYTES = 200
_PLAIN = re.compile(r"[\w.@+ -]")


def folder_name(name: str) -> str:
    """A name for people as the name of a folder: letters, digits, spaces and `_.@+-` as they are, others as `%XX`. Different names
    have different folders."""
    text = "".join(c if _PLAIN.fullmatch(c) else "".join(f"%{b:02X}" for b in c.encode()) for c in name)
    if text[:1] in (".", "-"):
        # Neither hidden, nor an option of a command.
        text = f"%{ord(text[0]):02X}{text[1:]}"
    if len(text.encode()) <= _FOLDER_BYTES:
        return text
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    return f"{text.encode()[: _FOLDER_BYTES - 20].decode(errors='ignore')}-{digest}"
