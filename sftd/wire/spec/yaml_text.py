"""Read YAML: numbers and booleans of YAML 1.2, no duplicate keys, and bounded work for any text."""

from __future__ import annotations

import re
from typing import Any

import yaml

from sftd.domain.errors import Problem, Refused, quote, shorten

# Deeper than any config, and far below Python's recursion limit.
_DEEPEST = 50
# Values that aliases and merge keys may add to the written ones: each level of aliases multiplies them.
_MOST_ADDED = 10_000
# Enough for any number in a config or a database.
_INTEGER_BITS = 64
_ALIAS_FIX = "quote a value that begins with *, as in '*.parquet': without quotes it is a YAML alias"


class Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers (`1e-5` is a number, as users expect) and booleans (only true and false).

    It rejects duplicate keys, and aliases or nesting that would need much more memory or deeper recursion than the text
    suggests. Raises only `yaml.YAMLError`."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._written = 0
        # id of a composed node → (number of values in it, with aliases expanded; depth).
        self._sizes: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node. Measures an alias before anything expands it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _error(f"is nested deeper than {_DEEPEST} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _error(f"the alias {quote(event.anchor)} contains itself", event.start_mark)
        elif node is not None:
            self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> None:
        if isinstance(node, yaml.MappingNode):
            inside = [self._sizes[id(part)] for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = [self._sizes[id(part)] for part in node.value]
        else:
            inside = []
        size, depth = 1 + sum(s for s, _ in inside), 1 + max((d for _, d in inside), default=0)
        self._written += 1
        self._sizes[id(node)] = size, depth
        if depth > _DEEPEST:
            raise _error(f"its aliases nest deeper than {_DEEPEST} levels", node.start_mark)
        if size > self._written + _MOST_ADDED:
            raise _error(f"its aliases expand to {size} values: use fewer aliases", node.start_mark)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping. Rejects duplicate keys here, because construction merges in the keys of `<<`."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise _error(f"the key {quote(key.value)} is given twice", key.start_mark)
                seen.add((key.tag, key.value))
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Construct the object of a node."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, IndexError, AttributeError, OverflowError):
            # PyYAML does not catch these for `!!int x`, `!!bool maybe` and more digits than Python converts.
            value = None
        else:
            if not isinstance(value, int) or value.bit_length() <= _INTEGER_BITS:
                return value
        kind = str(node.tag).rpartition(":")[2]
        raise _error(f"{quote(node.value)} is not {_KINDS.get(kind, f'a {kind}')}", node.start_mark)


_KINDS = {"int": f"a whole number of at most {_INTEGER_BITS} bits", "bool": "true or false"}


def _error(problem: str, mark: Any) -> yaml.composer.ComposerError:
    return yaml.composer.ComposerError(None, None, problem, mark)


Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# PyYAML's pattern without base 60 (4:30:00) and without 0x_, which has no digit.
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b_*[01][01_]*|0x_*[0-9a-fA-F][0-9a-fA-F_]*|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load_yaml(text: str, name: str) -> Any:
    """Parse one YAML document. `name` identifies the text in errors. Raises `Refused` with the line of the error."""
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{shorten(name)}, line {mark.line + 1}" if mark else shorten(name)
        problem = getattr(error, "problem", None) or str(error)
        is_alias = (
            getattr(error, "context", None) == "while scanning an alias" or "undefined alias" in problem
        )
        fix = _ALIAS_FIX if is_alias else "fix the line"
        raise Refused(Problem(place, f"is not valid YAML: {shorten(problem, 400)}", fix)) from None


def load_value(text: str, name: str) -> Any:
    """Parse the value of `key=value`. A value that begins with `*` is a pattern, because it has no anchor to refer to.
    Raises `Refused`."""
    return text.strip() if text.lstrip().startswith("*") else load_yaml(text, name)
