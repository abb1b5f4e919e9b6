"""From what a user wrote (nested mapping + overrides) to a resolved `Spec`, or to every problem with it at once."""

from __future__ import annotations

import difflib
import math
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from sftd.domain.errors import Problem, Refused
from sftd.domain.spec import Spec
from sftd.domain.spec_check import check
from sftd.domain.spec_sections import Section


def _struct_type(annotation: Any) -> type[Section] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None


def leaves(cls: type[Section] = Spec, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key of the spec as (dotted path, annotated type, default), in the order of the structs."""
    hints = get_type_hints(cls, include_extras=True)
    for field in msgspec.structs.fields(cls):
        path = prefix + field.name
        if section := _struct_type(hints[field.name]):
            yield from leaves(section, path + ".")
        else:
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            yield path, hints[field.name], default


LEAVES: dict[str, Any] = {path: annotation for path, annotation, _ in leaves()}
SECTIONS = {path.rsplit(".", n)[0] for path in LEAVES for n in range(1, path.count(".") + 1)}


class UnusableAlias(Exception):
    """An alias was used with a value that has no equal here; the text says what to write instead."""


def _same(target: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {target: value}


def _betas(value: Any) -> dict[str, Any]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise UnusableAlias("write two numbers, as [0.9, 0.95]")
    return {"optimizer.adam_beta1": value[0], "optimizer.adam_beta2": value[1]}


def _interval(target: str) -> Callable[[Any], dict[str, Any]]:
    # verl writes -1 for "never".
    return lambda value: {target: 0 if value in (-1, None) else value}


def _keep_last(value: Any) -> dict[str, Any]:
    if value in (None, -1):
        raise UnusableAlias("sftd always bounds its checkpoints; set checkpoint.keep_last to a number")
    return {"checkpoint.keep_last": value}


def _resume_mode(value: Any) -> dict[str, Any]:
    if value != "auto":
        raise UnusableAlias(
            "sftd always resumes a run by itself; use `sftd resume RUN --from-step N` for another checkpoint"
        )
    return {}


def _messages_key(value: Any) -> dict[str, Any]:
    raise UnusableAlias(
        f"sftd trains on tokenised Parquet; run `sftd prepare --messages-key {value} …` first"
    )


def _optional(target: str) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {} if value is None else {target: value}


def _warmup_steps(value: Any) -> dict[str, Any]:
    # verl writes -1 for "use the ratio".
    return {"scheduler.warmup_steps": None if value in (-1, None) else value}


_MEGATRON = "model.megatron."
ALIASES: dict[str, Callable[[Any], dict[str, Any]]] = {
    "model.path": _same("model.partial_pretrain"),
    "model.use_remove_padding": _same("training.use_rmpad"),
    **{
        f"engine.{name}": _same(_MEGATRON + name)
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size",
            "expert_model_parallel_size",
            "context_parallel_size",
            "use_distributed_optimizer",
        )
    },
    "engine.sequence_parallel": _same(_MEGATRON + "sequence_parallel"),
    "optim.lr": _same("optimizer.lr"),
    "optim.betas": _betas,
    "optim.weight_decay": _same("optimizer.weight_decay"),
    "optim.clip_grad": _same("optimizer.clip_grad"),
    "optim.lr_warmup_steps": _warmup_steps,
    "optim.lr_warmup_steps_ratio": _same("scheduler.warmup_ratio"),
    "optim.lr_decay_style": _same("scheduler.type"),
    "data.micro_batch_size_per_gpu": _same("training.micro_batch_size_per_gpu"),
    "data.max_length": _same("data.sequence_length"),
    "data.messages_key": _messages_key,
    "trainer.total_epochs": _optional("trainer.epochs"),
    "trainer.total_training_steps": _optional("trainer.max_steps"),
    "trainer.save_freq": _interval("trainer.save_interval"),
    "trainer.test_freq": _interval("trainer.val_check_interval"),
    "trainer.max_ckpt_to_keep": _keep_last,
    "trainer.resume_mode": _resume_mode,
    "trainer.seed": _same(_MEGATRON + "seed"),
}
# An absolute floor can only be turned into a ratio once the peak is known.
_MIN_LR = "optim.min_lr"


def _nearest(path: str) -> str:
    known = [*LEAVES, *ALIASES, _MIN_LR]
    by_path = difflib.get_close_matches(path, known, n=1, cutoff=0.75)
    if by_path:
        return by_path[0]
    last = path.rsplit(".", 1)[-1]
    tails = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    by_name = difflib.get_close_matches(last, tails, n=1, cutoff=0.7)
    return tails[by_name[0]] if by_name else ""


# Deeper than any key: a YAML alias can make a mapping contain itself.
_DEEPEST = 4


def _flatten(tree: Mapping[Any, Any], prefix: str, problems: list[Problem]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if path in LEAVES or path in ALIASES or path == _MIN_LR:
            yield path, value
        elif isinstance(value, Mapping) and path.count(".") < _DEEPEST:
            yield from _flatten(value, path + ".", problems)
        elif path in SECTIONS:
            # `optimizer:` with nothing under it is an empty section, not a mistake.
            if value is not None:
                problems.append(
                    Problem(path, f"is a section, but {value!r} was given", f"write {path}.KEY: VALUE")
                )
        else:
            nearest = _nearest(path)
            fix = f"did you mean `{nearest}`?" if nearest else "`sftd config` lists every key"
            problems.append(Problem(path, "unknown key", fix))


def _canonical(
    entries: Iterable[tuple[str, Any]], source: str, problems: list[Problem]
) -> tuple[dict[str, Any], Any]:
    """Translate aliases. Returns the canonical leaves and `optim.min_lr` when it was given."""
    out: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    min_lr = None
    for path, value in entries:
        if path == _MIN_LR:
            min_lr = value
            continue
        try:
            translated = {path: value} if path in LEAVES else ALIASES[path](value)
        except UnusableAlias as error:
            problems.append(Problem(path, f"{value!r} cannot be used here", str(error)))
            continue
        for target, target_value in translated.items():
            if source == "file" and target in out and out[target] != target_value:
                problems.append(
                    Problem(
                        path,
                        f"is another name for `{spelled[target]}`, and the two differ ({target_value!r}, {out[target]!r})",
                        "keep one of them",
                    )
                )
            out[target] = target_value
            spelled[target] = path
    return out, min_lr


def _accepts_list(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is list:
        return True
    return any(_accepts_list(arg) for arg in get_args(annotation)[:1]) if origin is not dict else False


def _expected(annotation: Any) -> str:
    base = annotation
    while get_origin(base) is not None and hasattr(base, "__metadata__"):
        base = base.__origin__
    origin = get_origin(base)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(arg) for arg in get_args(base))
    if base is type(None):
        return "null"
    if origin is list:
        return "a list of texts"
    if origin is dict:
        return "a mapping"
    if args := get_args(base):
        return "one of " + ", ".join(map(str, args))
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(
        base, str(base)
    )


def _convert(path: str, value: Any, problems: list[Problem]) -> Any:
    annotation = LEAVES[path]
    if isinstance(value, str) and _accepts_list(annotation):
        value = [value]
    try:
        converted = msgspec.convert(value, annotation)
    except msgspec.ValidationError as error:
        reason = re.sub(r" - at `.*`$", "", str(error))
        problems.append(Problem(path, f"{value!r}: {reason}", f"give {_expected(annotation)}"))
        return None
    if isinstance(converted, float) and not math.isfinite(converted):
        problems.append(Problem(path, f"{value!r} is not a finite number", "give a finite number"))
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
    """Make a resolved spec of a nested mapping and `(dotted key, value)` overrides, of which the later wins.

    Returns the spec and its warnings. Raises `Refused` with every problem found; the checks here need neither
    the model nor the data (see `layout.check_model`).
    """
    problems: list[Problem] = []
    from_file, min_lr = _canonical(_flatten(config, "", problems), "file", problems)
    override_entries: list[tuple[str, Any]] = []
    for key, value in overrides:
        # Hydra users write +key=value for a key that the file does not have.
        tree = _nested({key.removeprefix("+"): value})
        override_entries.extend(_flatten(tree, "", problems))
    from_overrides, min_lr_override = _canonical(override_entries, "overrides", problems)
    flat = from_file | from_overrides
    if min_lr_override is not None:
        min_lr = min_lr_override
    if min_lr is not None:
        lr = flat.get("optimizer.lr", Spec().optimizer.lr)
        if (
            all(isinstance(v, int | float) and not isinstance(v, bool) for v in (lr, min_lr))
            and 0 <= min_lr <= lr > 0
        ):
            if min_lr_override is not None and "scheduler.min_lr_ratio" not in from_overrides:
                flat.pop("scheduler.min_lr_ratio", None)
            flat.setdefault("scheduler.min_lr_ratio", min_lr / lr)
        else:
            problems.append(
                Problem(
                    _MIN_LR, f"{min_lr!r} is not between 0 and optimizer.lr ({lr!r})", "give a smaller number"
                )
            )
    values = {path: _convert(path, value, problems) for path, value in flat.items()}
    if problems:
        raise Refused(problems)
    spec = msgspec.convert(_nested(values), Spec)
    problems, warnings = check(spec)
    if problems:
        raise Refused(problems)
    return _resolve(spec), warnings


def change(spec: Spec, overrides: Iterable[tuple[str, Any]]) -> tuple[Spec, list[Problem]]:
    """A resolved spec with `(dotted key, value)` overrides laid over it: what `_resolve` filled in follows them.

    Returns the new spec and its warnings. Raises `Refused`.
    """
    config = msgspec.to_builtins(spec)
    config["training"]["gradient_accumulation_steps"] = None
    free = msgspec.structs.replace(spec, launch=msgspec.structs.replace(spec.launch, nproc_per_node=None))
    if free.nproc_per_node == spec.launch.nproc_per_node:
        # As many ranks as the layout needs: as many as the new one needs.
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
