"""Spec files: YAML as users write it, `key=value` overrides, paths made absolute."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from sftd.domain import spec_parse
from sftd.domain.errors import Problem, Refused
from sftd.domain.spec import Spec
from sftd.domain.spec_parse import parse


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 numbers (`1e-5` is a number, as every user means) and booleans (only true and false),
    and that refuses a key given twice instead of silently taking the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not when objects are made: by then `<<` has mixed other mappings' keys in.
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"the key {key.value!r} is given twice"
                    raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return node


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if not tag.endswith((":bool", ":float", ":int", ":timestamp"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# As PyYAML's, but for 4:30:00, which it reads in base 60: 16200.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def load_yaml(text: str, name: str) -> Any:
    """Parse one YAML document. Raises `Refused` with the line that is wrong."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise Refused(Problem(place, f"is not valid YAML: {problem}", "fix the line")) from None


def load_file(path: str) -> dict[str, Any]:
    """Read a spec file. Raises `Refused`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise Refused(Problem(path, f"cannot be read: {reason}", "give the path of a YAML file")) from None
    tree = load_yaml(text, path)
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise Refused(Problem(path, "is not a mapping of sections", "begin with `model:`, `data:`, …"))
    return tree


def parse_overrides(arguments: Iterable[str]) -> list[tuple[str, Any]]:
    """`["optimizer.lr=1e-5", …]` → `[("optimizer.lr", 1e-05), …]`. Raises `Refused`."""
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key:
            raise Refused(
                Problem(argument, "is not of the form key=value", "write for example optimizer.lr=1e-5")
            )
        overrides.append((key.strip(), load_yaml(value, argument)))
    return overrides


def _absolute(path: str, base: str) -> str:
    return os.path.normpath(os.path.join(base, os.path.expanduser(path)))


def read(path: str | None, arguments: Iterable[str], base: str) -> tuple[Spec, list[Problem]]:
    """Read a spec file and overrides into a resolved spec whose paths are absolute, relative ones taken from `base`.

    Without a file the overrides say everything. Returns the spec and its warnings. Raises `Refused`.
    """
    spec, warnings = parse(load_file(path) if path is not None else {}, parse_overrides(arguments))
    return _with_absolute_paths(spec, base), warnings


def change(spec: Spec, arguments: Iterable[str], base: str) -> tuple[Spec, list[Problem]]:
    """A resolved spec with `key=value` laid over it; relative paths are taken from `base`. Returns the new spec and its
    warnings. Raises `Refused`."""
    changed, warnings = spec_parse.change(spec, parse_overrides(arguments))
    return _with_absolute_paths(changed, base), warnings


def _with_absolute_paths(spec: Spec, base: str) -> Spec:
    replace = msgspec.structs.replace
    return replace(
        spec,
        model=replace(spec.model, partial_pretrain=_absolute(spec.model.partial_pretrain, base)),
        data=replace(
            spec.data,
            train_files=[_absolute(p, base) for p in spec.data.train_files],
            val_files=[_absolute(p, base) for p in spec.data.val_files],
        ),
        checkpoint=replace(
            spec.checkpoint,
            save_dir=_absolute(spec.checkpoint.save_dir, base) if spec.checkpoint.save_dir else "",
        ),
    )
