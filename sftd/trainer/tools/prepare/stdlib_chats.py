"""Makes the demo's data set from the docstrings of Python's standard library.

Every documented public function and method becomes one chat. The question is what it does, the answer is the summary of
its docstring. All answers have one terse style, unlike a chat model's, so a few training steps visibly change the model's
answers.
"""

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import pkgutil
import platform
import re
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sftd.trainer.chat.errors import PrepareError

# Not imported: they open something, print, register hooks, contain an application or a test suite, or duplicate other
# modules.
_SKIPPED = frozenset(
    (
        *(
            "antigravity",
            "encodings",
            "ensurepip",
            "genericpath",
            "idlelib",
            "lib2to3",
            "nt",
            "ntpath",
            "posix",
        ),
        *(
            "posixpath",
            "pydoc_data",
            "rlcompleter",
            "sre_compile",
            "sre_constants",
            "sre_parse",
            "test",
            "this",
        ),
        *("tkinter", "turtle", "turtledemo", "venv", "xxlimited", "xxlimited_35", "xxsubtype"),
    )
)
# Modules that no package lists.
_EXTRA = ("os.path",)
_SIGNATURE = re.compile(r"[\w.]+\([^()]*(\([^()]*\)[^()]*)*\)(\s*->.*)?")
_CALL = re.compile(r"[\w.]+\(")
_MIN_WORDS, _MAX_WORDS = 3, 60
_VAL_SHARE = 0.05
_CALLABLES = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
)


def write_stdlib_chats(out_dir: Path, *, rows: int | None = None) -> dict[str, Any]:
    """Write `train.jsonl` and `val.jsonl` (about 5 %) to `out_dir`; at most `rows` chats together.

    One `{"messages": [user, assistant]}` per line, ordered by a hash of the question, which is effectively shuffled. The
    content depends only on the running Python's version and build. No question and no answer is in both files. Returns the
    fields of the `done` event: `python`, and for `train` and `val` each `path`, `rows` and `sha256`. Raises PrepareError
    when `rows` is less than 2.
    """
    if rows is not None and rows < 2:
        raise PrepareError(f"{rows} chats are too few: at least 2, one to train on and one to validate with.")
    # Ordered by hash, so that a smaller data set is an even sample and a subset of a larger one.
    chats = sorted((_fraction(question), question, answer) for question, answer in stdlib_chats())[:rows]
    val = [chat for chat in chats if _fraction("val:" + chat[1]) < _VAL_SHARE] or chats[-1:]
    held_out = {question for _, question, _ in val}
    train = [chat for chat in chats if chat[1] not in held_out]
    out_dir.mkdir(parents=True, exist_ok=True)
    return {
        "python": platform.python_version(),
        "train": _write(out_dir / "train.jsonl", train),
        "val": _write(out_dir / "val.jsonl", val),
    }


def stdlib_chats() -> list[tuple[str, str]]:
    """All (question, answer) pairs, sorted; questions and answers are each unique."""
    named: dict[str, tuple[str, str]] = {}
    for module_name in sorted(_module_names()):
        module = _import(module_name)
        if module is not None:
            for name, kind, doc in _documented(module):
                summary = summarize(doc)
                if summary is not None:
                    named[name] = (kind, summary)
    # If an object has several names (asyncio.run, asyncio.runners.run), the shortest is the public one.
    by_summary: dict[str, str] = {}
    for name in sorted(named, key=lambda name: (name.count("."), len(name), name)):
        by_summary.setdefault(named[name][1], name)
    return sorted(
        (f"What does the Python {named[name][0]} `{name}` do?", summary)
        for summary, name in by_summary.items()
    )


def summarize(doc: str) -> str | None:
    """A docstring's first paragraph as one sentence; None if it is not usable."""
    paragraphs = [
        " ".join(part.split()) for part in re.split(r"\n\s*\n", _without_signature(inspect.cleandoc(doc)))
    ]
    summary = next((paragraph for paragraph in paragraphs if paragraph), "")
    if not summary[:1].isupper() or _CALL.match(summary) or ">>>" in summary or "->" in summary:
        return None  # a signature or a fragment, not a sentence
    if not _MIN_WORDS <= len(summary.split()) <= _MAX_WORDS:
        return None
    return summary if summary[-1] in ".!?" else summary.rstrip(" :;,") + "."


def _without_signature(doc: str) -> str:
    """Drop leading lines that repeat the signature, as in old docstrings."""
    lines = doc.splitlines()
    while lines and (not lines[0].strip() or _SIGNATURE.fullmatch(lines[0].strip())):
        del lines[0]
    return "\n".join(lines)


def _module_names() -> Iterator[str]:
    yield from _EXTRA
    for name in sys.stdlib_module_names:
        if not name.startswith("_") and name not in _SKIPPED:
            yield name
            yield from _submodule_names(name)


def _submodule_names(package: str) -> Iterator[str]:
    module = _import(package)
    for found in pkgutil.iter_modules(getattr(module, "__path__", [])):
        if not found.name.startswith("_") and found.name not in ("test", "tests", "idle_test"):
            name = f"{package}.{found.name}"
            yield name
            if found.ispkg:
                yield from _submodule_names(name)


def _import(name: str) -> types.ModuleType | None:
    """Import a module silently; None if this platform or build lacks it."""
    with (
        warnings.catch_warnings(),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")  # includes deprecated modules
        try:
            return importlib.import_module(name)
        except Exception:  # noqa: BLE001 - mostly ImportError, but optional modules can raise anything
            return None


def _documented(module: types.ModuleType) -> Iterator[tuple[str, str, str]]:
    """(qualified name, `function` or `method`, docstring) of a module's public callables."""
    prefix = (
        "" if module.__name__ == "builtins" else ("os.path." if module is os.path else module.__name__ + ".")
    )
    for name, value in _public(module):
        if isinstance(value, type):
            if issubclass(value, BaseException):
                continue
            for method_name, method in sorted(vars(value).items()):
                function = getattr(method, "__func__", method)  # of a classmethod or staticmethod
                if not method_name.startswith("_") and isinstance(function, _CALLABLES) and function.__doc__:
                    yield f"{prefix}{name}.{method_name}", "method", function.__doc__
        elif isinstance(value, _CALLABLES) and value.__doc__:
            yield f"{prefix}{name}", "function", value.__doc__


def _public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """The names in a module's `__all__`, or else the public names that it defines."""
    listed = getattr(module, "__all__", None)
    for name, value in sorted(vars(module).items()):
        if listed is not None:
            if name in listed:
                yield name, value
        elif not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name, value


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends only on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / 2**48


def _write(path: Path, chats: list[tuple[float, str, str]]) -> dict[str, Any]:
    lines = []
    for _, question, answer in chats:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    content = "".join(lines).encode()
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
    return {"path": str(path.resolve()), "rows": len(chats), "sha256": hashlib.sha256(content).hexdigest()}
