"""Parse a user's config (nested mapping and overrides) into a resolved `Spec`, or collect all of its problems."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
from msgspec import inspect

from sftd.domain.errors import Problem, Refused, quote, shorten
from sftd.domain.spec.aliases import ALIASES, MIN_LR, WITH_RANK, UnusableAlias, UnusedAlias
from sftd.domain.spec.other_configs import known, refusal
from sftd.domain.spec.other_trainers import BY_NAME
from sftd.domain.spec.rules import SPEC
from sftd.domain.spec.sections import Section
from sftd.domain.spec.spec import Spec


def _struct_type(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def _bare(annotation: Any) -> Any:
    """A type without its metadata."""
    return annotation.__origin__ if hasattr(annotation, "__metadata__") else annotation


def entry_types(annotation: Any) -> list[type[Section]]:
    """The types of the mappings that a key's value is, or of those in its list; empty for other keys."""
    bare = _bare(annotation)
    item = get_args(bare)[0] if get_origin(bare) is list else bare
    return [found for kind in get_args(item) or (item,) if (found := _struct_type(kind))]


def leaves(cls: type[Section] = Spec, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(dotted path, annotated type, default) of every key of the spec, in the order of the structs. The default is
    `msgspec.NODEFAULT` for a required key, which only an entry of a list has."""
    hints = get_type_hints(cls, include_extras=True)
    for field in msgspec.structs.fields(cls):
        path = prefix + field.name
        if section := _struct_type(hints[field.name]):
            yield from leaves(section, path + ".")
        else:
            has_factory = field.default_factory is not msgspec.NODEFAULT
            yield path, hints[field.name], field.default_factory() if has_factory else field.default


LEAVES: dict[str, Any] = {path: annotation for path, annotation, _ in leaves()}
SECTIONS = {path.rsplit(".", n)[0] for path in LEAVES for n in range(1, path.count(".") + 1)}


_MIN_LR_RATIO = "scheduler.min_lr_ratio"
# Paths with keys below them, including those of aliases and other trainers.
_ABOVE = SECTIONS | {
    name.rsplit(".", n)[0] for name in (*ALIASES, *BY_NAME) for n in range(1, name.count(".") + 1)
}


# Longer texts are not compared with the keys: it is slow, and none is close to a key.
_LONGEST_KEY = 100


def _nearest(path: str) -> str:
    """The key or alias with the most similar spelling; empty if none is close."""
    if len(path) > _LONGEST_KEY:
        return ""
    aliases = [name for name, alias in ALIASES.items() if alias.keys]
    if by_path := difflib.get_close_matches(path, [*LEAVES, *aliases], n=1, cutoff=0.85):
        return by_path[0]
    tails = {key.rpartition(".")[2]: key for key in (*reversed(aliases), *reversed(LEAVES))}
    by_name = difflib.get_close_matches(path.rpartition(".")[2], tails, n=1, cutoff=0.8)
    return tails[by_name[0]] if by_name else ""


def _unknown(path: str) -> Problem:
    row = known(path)
    if row is not None and not row.here:
        return Problem(path, "has no counterpart in sftd", f"leave it out: {row.note}")
    if row is not None:
        return Problem(path, "unknown key", f"write {row.answer}")
    nearest = _nearest(path)
    fix = f"did you mean `{nearest}`?" if nearest else "`sftd config` lists every key"
    return Problem(shorten(path), "unknown key", fix)


# Deeper than any key.
_DEEPEST = 4


def _flatten(
    tree: Mapping[Any, Any], prefix: str, problems: list[Problem], warnings: list[Problem]
) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        row = BY_NAME.get(path)
        is_mapping = isinstance(value, Mapping)
        if path in LEAVES or path in ALIASES:
            yield path, value
        elif is_mapping and (path in _ABOVE or row is None) and path.count(".") < _DEEPEST:
            yield from _flatten(value, path + ".", problems, warnings)
        elif row is not None and row.is_neutral(value):
            continue
        elif path in SECTIONS:
            # `optimizer:` with nothing under it is an empty section, not a mistake.
            if value is not None:
                what = f"is a section, but {quote(value)} was given"
                problems.append(Problem(path, what, f"write {path}.KEY: VALUE"))
        elif row is not None and row.harmless:
            warnings.append(Problem(path, f"is not used: {row.note}"))
        else:
            problems.append(_unknown(path))


def _canonical(
    entries: Iterable[tuple[str, Any]], source: str, problems: list[Problem], warnings: list[Problem]
) -> dict[str, Any]:
    """Translate aliases. Returns key → value; the keys are leaves of the spec, `MIN_LR`, or those of `WITH_RANK`."""
    out: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for path, value in entries:
        try:
            translated = {path: value} if path in LEAVES else ALIASES[path].translate(value)
        except UnusableAlias as error:
            problems.append(Problem(path, f"{quote(value)} cannot be used here", str(error)))
            continue
        except UnusedAlias as error:
            warnings.append(Problem(path, f"{quote(value)} is not used", str(error)))
            continue
        for target, target_value in translated.items():
            if source == "file" and target in out and out[target] != target_value:
                problems.append(
                    Problem(
                        path,
                        f"is another name for `{spelled[target]}`, and the two differ ({quote(target_value)}, "
                        f"{quote(out[target])})",
                        "keep one of them",
                    )
                )
            out[target] = target_value
            spelled[target] = path
    return out


_WORDS = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.BoolType: "true or false",
    inspect.StrType: "a text",
    inspect.ListType: "a list of texts",
    inspect.DictType: "a mapping",
    inspect.NoneType: "null",
}
_YAML_1_1_BOOLEANS = frozenset({"yes", "no", "on", "off", "y", "n"})


def _kinds(path: str) -> list[inspect.Type]:
    """The types of a key's values."""
    found = inspect.type_info(LEAVES[path])
    while isinstance(found, inspect.Metadata):
        found = found.type
    kinds = found.types if isinstance(found, inspect.UnionType) else (found,)
    return [kind.type if isinstance(kind, inspect.Metadata) else kind for kind in kinds]


def _word(kind: inspect.Type) -> str:
    """What to give for a value of this type."""
    if isinstance(kind, inspect.ListType) and isinstance(kind.item_type, inspect.LiteralType):
        return f"a list of some of {', '.join(map(str, kind.item_type.values))}, such as [{kind.item_type.values[-1]}]"
    if isinstance(kind, inspect.LiteralType):
        return "one of " + ", ".join(map(str, kind.values))
    return _WORDS[type(kind)]


def _with_lists(entries: Any, types: list[type[Section]]) -> Any:
    """Entries with a text in the place of a list as a list of it."""
    lists = {name for cls in types for name, kind, _ in leaves(cls) if get_origin(_bare(kind)) is list}
    if not isinstance(entries, list):
        return entries
    return [
        {key: [value] if key in lists and isinstance(value, str) else value for key, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for entry in entries
    ]


def _convert(path: str, value: Any, problems: list[Problem]) -> Any:
    if isinstance(value, str) and any(isinstance(kind, inspect.ListType) for kind in _kinds(path)):
        value = [value]
    if types := entry_types(LEAVES[path]):
        value = _with_lists(value, types)
    try:
        converted = msgspec.convert(value, LEAVES[path])
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        reason = shorten(reason)
        if types:
            # The place in the list, such as `[0].name`.
            where = shorten(path + place.removesuffix("`"))
            problems.append(
                Problem(where, reason, "give the keys of an entry that `sftd config --markdown` lists")
            )
            return None
        fix = "give " + " or ".join(map(_word, _kinds(path)))
        is_word = isinstance(value, str) and value.lower() in _YAML_1_1_BOOLEANS
        if is_word and any(isinstance(kind, inspect.BoolType) for kind in _kinds(path)):
            fix += "; yes, no, on and off are texts, as in YAML 1.2"
        problems.append(Problem(path, f"{quote(value)}: {reason}", fix))
        return None
    if isinstance(converted, float) and not math.isfinite(converted):
        problems.append(Problem(path, f"{quote(value)} is not a finite number", "give a finite number"))
    return converted


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = value
    return tree


def parse(config: Mapping[str, Any], overrides: Iterable[tuple[str, Any]] = ()) -> tuple[Spec, list[Problem]]:
    """Make a resolved spec from a nested mapping and `(dotted key, value)` overrides. A later override wins.

    Returns the spec and its warnings. Raises `Refused` with all problems, including those of `SPEC`. Rules that need facts
    are applied at submit (`domain/submit/judge.py`).
    """
    problems = refusal(config, _ABOVE)
    if problems:
        raise Refused(problems)
    left_out: list[Problem] = []
    from_file = _canonical(_flatten(config, "", problems, left_out), "file", problems, left_out)
    entries: list[tuple[str, Any]] = []
    for key, value in overrides:
        # Hydra users write +key=value for a key that the file does not have.
        entries.extend(_flatten(_nested({key.removeprefix("+"): value}), "", problems, left_out))
    from_overrides = _canonical(entries, "overrides", problems, left_out)
    flat = from_file | from_overrides
    if MIN_LR in from_overrides and _MIN_LR_RATIO not in from_overrides:
        flat.pop(_MIN_LR_RATIO, None)
    if MIN_LR in flat:
        lr, min_lr = flat.get("optimizer.lr", Spec().optimizer.lr), flat.pop(MIN_LR)
        are_numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (lr, min_lr))
        if are_numbers and 0 <= min_lr <= lr > 0:
            flat.setdefault(_MIN_LR_RATIO, min_lr / lr)
        else:
            what = f"{quote(min_lr)} is not between 0 and optimizer.lr ({quote(lr)})"
            problems.append(Problem(MIN_LR, what, "give a smaller number"))
    for name, key in WITH_RANK.items():
        if name in from_overrides and key not in from_overrides:
            flat.pop(key, None)
        value = flat.pop(name, None)
        if value is not None and flat.get("model.lora.rank"):
            flat.setdefault(key, value)
    values = {path: _convert(path, value, problems) for path, value in flat.items()}
    if problems:
        raise Refused(problems)
    spec = msgspec.convert(_nested(values), Spec)
    if problems := SPEC.problems(spec):
        raise Refused(problems)
    return _resolve(spec), left_out + SPEC.warnings(spec)


def change(spec: Spec, overrides: Iterable[tuple[str, Any]]) -> tuple[Spec, list[Problem]]:
    """Apply `(dotted key, value)` overrides to a resolved spec. Values that `_resolve` filled in are computed again.

    Returns the new spec and its warnings. Raises `Refused`.
    """
    config = msgspec.to_builtins(spec)
    config["training"]["gradient_accumulation_steps"] = None
    free = msgspec.structs.replace(spec, launch=msgspec.structs.replace(spec.launch, nproc_per_node=None))
    if free.nproc_per_node == spec.launch.nproc_per_node:
        # The number of ranks is the default of the old layout, so use the default of the new one.
        config["launch"]["nproc_per_node"] = None
    given = list(overrides)
    if any(key.removeprefix("+") in ("trainer.epochs", "trainer.total_epochs") for key, _ in given):
        config["trainer"]["max_steps"] = None
    return parse(config, given)


def _resolve(spec: Spec) -> Spec:
    trainer = spec.trainer
    if trainer.max_steps is not None:
        trainer = msgspec.structs.replace(trainer, epochs=None)
    elif trainer.epochs is None:
        trainer = msgspec.structs.replace(trainer, epochs=1)
    return msgspec.structs.replace(
        spec,
        trainer=trainer,
        launch=msgspec.structs.replace(spec.launch, nproc_per_node=spec.nproc_per_node),
        training=msgspec.structs.replace(spec.training, gradient_accumulation_steps=spec.num_microbatches),
    )
