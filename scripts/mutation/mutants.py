"""Mutants of a source file: mutmut's operators, applied to every node.

mutmut's own runner changes only the bodies of undecorated functions. Half of sftd's facts are elsewhere: defaults of Structs,
tables, properties. So this module uses mutmut's operators with its own walk.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

_SKIPPED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Assert, cst.TypeAlias)
"""Types, and assertions that narrow them, do not change behaviour."""
_STRICT = re.compile(r",\s*(?:strict=\w+)?\s*(?=\)$)")
_LEFT_ALONE = {"cast", "TypeVar", "NewType", "isinstance", "len"}


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    id: a digest of the enclosing definition and the texts, independent of line numbers. place: qualified name of the
    definition. lines: first and last line of the changed statement, from 1. inside: the change is in the body of a top-level
    function or a method, so the function's code can be exchanged in a running process. names: the names that a statement
    outside of functions defines. before, after: the changed lines.
    """

    id: str
    path: str
    place: str
    function: tuple[str, ...]
    lines: tuple[int, int]
    inside: bool
    names: tuple[str, ...]
    before: str
    after: str
    source: str


@dataclass(frozen=True)
class _Found:
    key: str
    place: tuple[str, ...]
    function: tuple[str, ...]
    lines: tuple[int, int]
    inside: bool
    names: tuple[str, ...]
    statement: int
    node: cst.CSTNode
    new: cst.CSTNode


class _Walk(cst.CSTVisitor):
    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self, module: cst.Module) -> None:
        super().__init__()
        self.module = module
        self.found: list[_Found] = []
        self.wording = 0
        self._statement = -1
        self._tops = {id(node): number for number, node in enumerate(module.body)}
        self._place: list[tuple[str, str]] = []
        self._blocks = {id(definition.body) for definition in _definitions(module)}
        self._open = 0
        self._names: tuple[str, ...] = ()
        self._line: cst.CSTNode | None = None
        self._seen: Counter[tuple[str, ...]] = Counter()

    def on_visit(self, node: cst.CSTNode) -> bool:
        if id(node) in self._tops:
            self._statement = self._tops[id(node)]
        if isinstance(node, cst.Arg) and node.keyword is not None and node.keyword.value == "strict":
            return False
        if isinstance(node, _SKIPPED) or _is_type_checking(node) or _is_typing(node):
            return False
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            self._place.append((type(node).__name__, node.name.value))
        self._open += id(node) in self._blocks
        if isinstance(node, cst.SimpleStatementLine):
            self._line = node
        if isinstance(node, cst.Assign | cst.AnnAssign) and not self._in_function():
            targets = [t.target for t in node.targets] if isinstance(node, cst.Assign) else [node.target]
            self._names = tuple(t.value for t in targets if isinstance(t, cst.Name))
        self._mutate(node)
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            self._place.pop()
        self._open -= id(node) in self._blocks
        if node is self._line:
            self._line = None
        if isinstance(node, cst.Assign | cst.AnnAssign) and not self._in_function():
            self._names = ()

    def _in_function(self) -> bool:
        return any(kind == "FunctionDef" for kind, _ in self._place)

    def _function(self) -> tuple[str, ...]:
        """Return the path of the outermost function whose body contains the node, or ()."""
        kinds = [kind for kind, _ in self._place]
        if "FunctionDef" not in kinds:
            return ()
        outermost = kinds.index("FunctionDef")
        # Decorators and defaults are not in the body.
        if self._open <= outermost:
            return ()
        return tuple(name for _, name in self._place[: outermost + 1])

    def _mutate(self, node: cst.CSTNode) -> None:
        for kind, operator in mutation_operators:
            if not isinstance(node, kind):
                continue
            made = list(operator(node))
            if isinstance(node, cst.BaseString):
                if _is_wording(node):
                    self.wording += min(1, len(made))
                    continue
                made = made[:1]
            for new in made:
                if not self._is_guard(node, new):
                    self._add(operator.__name__, node, new)

    def _is_guard(self, node: cst.CSTNode, new: cst.CSTNode) -> bool:
        """Whether only zip's `strict` changes, which checks an invariant."""
        if not (isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value == "zip"):
            return False
        old, changed = (_STRICT.sub("", self.module.code_for_node(n)) for n in (node, new))
        return old == changed

    def _add(self, operator: str, node: cst.CSTNode, new: cst.CSTNode) -> None:
        position = self.get_metadata(PositionProvider, self._line or node, None)
        if position is None or self._statement < 0:
            return
        place = tuple(name for _, name in self._place)
        kind = (".".join([*place, *self._names]), operator)
        self._seen[kind] += 1
        function = self._function()
        self.found.append(
            _Found(
                "\0".join([*kind, str(self._seen[kind])]),
                place,
                function,
                (position.start.line, position.end.line),
                bool(function),
                self._names or place[:1],
                self._statement,
                node,
                new,
            )
        )


def _definitions(module: cst.Module) -> Iterator[Any]:
    stack: list[cst.CSTNode] = [module]
    while stack:
        node = stack.pop()
        if isinstance(node, cst.ClassDef | cst.FunctionDef):
            yield node
        stack.extend(node.children)


def _is_type_checking(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.If) and isinstance(node.test, cst.Name) and node.test.value == "TYPE_CHECKING"


def _is_typing(node: cst.CSTNode) -> bool:
    return isinstance(node, cst.Call) and isinstance(node.func, cst.Name) and node.func.value in _LEFT_ALONE


def _is_wording(node: cst.BaseString) -> bool:
    """Whether a string is text for users: it has blanks. Expressions of f-strings are mutated."""
    return isinstance(node, cst.SimpleString) and " " in node.value.strip("\"' ")


def find(path: Path) -> tuple[list[_Found], cst.Module, int]:
    """Return the possible changes of a file, its module, and the number of strings that are wording and skipped."""
    wrapper = MetadataWrapper(cst.parse_module(path.read_text()), unsafe_skip_copy=True)
    walk = _Walk(wrapper.module)
    wrapper.visit(walk)
    return walk.found, wrapper.module, walk.wording


def make(found: Sequence[_Found], module: cst.Module, path: str) -> Iterator[Mutant]:
    """Yield a mutant for each change that is valid Python and changes the file."""
    texts = [module.code_for_node(statement) for statement in module.body]
    head = "".join(module.code_for_node(line) for line in module.header)
    foot = "".join(module.code_for_node(line) for line in module.footer)
    original = module.code
    for item in found:
        changed = module.body[item.statement].deep_replace(item.node, item.new)
        pieces = [*texts[: item.statement], module.code_for_node(changed), *texts[item.statement + 1 :]]
        source = head + "".join(pieces) + foot
        try:
            compile(source, path, "exec", dont_inherit=True)
        except SyntaxError:
            continue
        if source == original:
            continue
        before, after = _difference(texts[item.statement], pieces[item.statement])
        said = "\0".join([item.key, before, after])
        yield Mutant(
            hashlib.sha256(said.encode()).hexdigest()[:16],
            path,
            ".".join(item.place),
            item.function,
            item.lines,
            item.inside,
            item.names,
            before,
            after,
            source,
        )


def _difference(old: str, new: str) -> tuple[str, str]:
    lines = [
        line
        for line in difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
        if not line.startswith(("---", "+++", "@@"))
    ]
    return (
        "\n".join(line[1:].strip() for line in lines if line[0] == "-"),
        "\n".join(line[1:].strip() for line in lines if line[0] == "+"),
    )


def sample(found: Sequence[_Found], size: int | None, seed: str) -> list[_Found]:
    """Return the `size` changes (None: all) with the smallest digests of their keys, so that an edit keeps most of a sample."""
    ordered = sorted(found, key=lambda f: hashlib.sha256((seed + f.key).encode()).hexdigest())
    return ordered[:size]
