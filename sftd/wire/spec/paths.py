"""Resolve the paths of a spec to absolute paths on this host."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from glob import escape, glob, has_magic

import msgspec

from sftd.domain.errors import Problem, Refused, quote, shorten
from sftd.domain.spec.spec import Spec
from sftd.wire.model.hub_cache import cached_model, is_hub_id

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HUB_PAGE = re.compile(
    r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+?)(?:/tree/.*)?/?|hf://([\w.-]+/[\w.-]+)"
)
_VARIABLE = re.compile(r"\$(?:\{([^}]*)\}|([A-Za-z_]\w*))")
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


def resolve(
    spec: Spec,
    base: str,
    beside: str | None = None,
    environ: Mapping[str, str] = os.environ,
    *,
    resolved: Spec | None = None,
) -> Spec:
    """The spec with absolute paths; relative ones start at `base`. Expands `~` and environment variables, replaces patterns and
    folders of data by their files in name order, and a hub id by the model's folder in the local cache.

    `beside` is the folder of the config: the error points out files that exist only there. Paths of `resolved`, an earlier
    spec, stay as they are. Raises `Refused` with every unusable path. Does not check that files exist; reading them does.
    """
    paths = _Paths(base, beside, environ, _all_paths(resolved) if resolved else frozenset())
    replace = msgspec.structs.replace
    lora = spec.model.lora
    if lora.adapter:
        lora = replace(lora, adapter=paths.model("model.lora.adapter", lora.adapter))
    made = replace(
        spec,
        model=replace(
            spec.model,
            partial_pretrain=paths.model("model.partial_pretrain", spec.model.partial_pretrain),
            lora=lora,
        ),
        data=replace(
            spec.data,
            train_files=paths.files("data.train_files", spec.data.train_files),
            val_files=paths.files("data.val_files", spec.data.val_files),
            sources=[
                replace(
                    source,
                    files=paths.files(f"data.sources[{number}].files", source.files),
                    val_files=paths.files(f"data.sources[{number}].val_files", source.val_files),
                )
                for number, source in enumerate(spec.data.sources)
            ],
        ),
        checkpoint=replace(
            spec.checkpoint,
            save_dir=paths.path("checkpoint.save_dir", spec.checkpoint.save_dir)
            if spec.checkpoint.save_dir
            else "",
        ),
    )
    if paths.problems:
        raise Refused(paths.problems)
    return made


def _all_paths(spec: Spec) -> frozenset[str]:
    own = spec.model.partial_pretrain, spec.model.lora.adapter, spec.checkpoint.save_dir
    return frozenset((*own, *spec.data.all_train_files, *spec.data.all_val_files))


def model_folder(where: str, text: str, base: str, environ: Mapping[str, str] = os.environ) -> str:
    """The folder of a model given as a path relative to `base` or as a hub id in the local cache. Raises `Refused` for a hub id
    that the cache does not have."""
    paths = _Paths(base, None, environ, frozenset())
    folder = paths.model(where, text)
    if paths.problems:
        raise Refused(paths.problems)
    return folder


class _Paths:
    def __init__(
        self, base: str, beside: str | None, environ: Mapping[str, str], resolved: frozenset[str]
    ) -> None:
        self.problems: list[Problem] = []
        self._resolved = resolved
        self._base = base
        self._beside = (
            beside if beside is not None and os.path.abspath(beside) != os.path.abspath(base) else None
        )
        self._environ = environ

    def path(self, where: str, text: str) -> str:
        """The absolute path. A path that exists literally is not expanded, whatever characters it contains."""
        literal = self._absolute(text)
        if text in self._resolved or os.path.exists(literal):
            return literal
        if _URL.match(text):
            fix = "copy it here, and give the path"
            if hub := _HUB_PAGE.fullmatch(text):
                fix = f"`hf download {shorten(hub[1] or hub[2])} --local-dir DIR`, and give DIR"
            elif text.startswith("file://"):
                fix = "write the path alone"
            self._refuse(where, f"{shorten(text)} is a URL, but sftd reads only files of this host", fix)
            return literal
        return self._absolute(self._expand(where, text))

    def files(self, where: str, texts: Sequence[str]) -> list[str]:
        """The absolute paths of data files."""
        return [file for text in texts for file in self._files(where, text)]

    def model(self, where: str, text: str) -> str:
        """The folder of a model."""
        path = self.path(where, text)
        if text in self._resolved or os.path.exists(path):
            return path
        if is_hub_id(text):
            if cached := cached_model(text, self._environ):
                return cached
            organisation, slash, _ = text.partition("/")
            if slash and not os.path.isdir(self._absolute(organisation)):
                name = shorten(text)
                what = f"there is no folder {name} in {self._base}, and no model of that name in the Hugging Face cache"
                fix = f"if it is a hub id: `hf download {name} --local-dir DIR`, and give DIR"
                self._refuse(where, what, fix)
                return path
        self._look_beside(where, text)
        return path

    def _files(self, where: str, text: str) -> list[str]:
        known = len(self.problems)
        path = self.path(where, text)
        if len(self.problems) > known:
            return []
        if text in self._resolved:
            return [path]
        if os.path.isdir(path):
            return self._in_folder(where, path)
        if os.path.exists(path):
            return [path]
        if has_magic(text):
            # The base is a literal folder name, not a pattern.
            pattern = os.path.expanduser(self._expand(where, text))
            if found := _matches(os.path.join(escape(self._base), pattern)):
                return found
            if not self._look_beside(where, text):
                what = f"{shorten(text)} matches no file in {self._base}"
                self._refuse(
                    where, what, "check the pattern; relative ones start at the folder you submit from"
                )
            return []
        return [] if self._look_beside(where, text) else [path]

    def _in_folder(self, where: str, folder: str) -> list[str]:
        try:
            names = sorted(n for n in os.listdir(folder) if n.endswith(".parquet") and n[0] not in "._")
        except OSError as error:
            self._refuse(where, f"{folder} cannot be read: {error.strerror}", "give files that you may read")
            return []
        if not names:
            what = f"{folder} is a folder without Parquet files of its own"
            self._refuse(where, what, "give files, or a pattern such as 'FOLDER/**/*.parquet'")
        return [os.path.join(folder, name) for name in names]

    def _look_beside(self, where: str, text: str) -> bool:
        """Whether the path exists only in the config's folder. If so, refuses it instead of using it: a file of that name may
        appear in the base later."""
        if self._beside is None or os.path.isabs(os.path.expanduser(text)):
            return False
        there = os.path.join(self._beside, text)
        if not os.path.exists(there) and not (
            has_magic(text) and _matches(os.path.join(escape(self._beside), text))
        ):
            return False
        what = f"{shorten(text)} is not in {self._base}, where you submit, but beside the config"
        relative = os.path.relpath(os.path.abspath(there), self._base)
        self._refuse(where, what, f"write {shorten(relative)}, or submit from the config's folder")
        return True

    def _absolute(self, text: str) -> str:
        return os.path.normpath(os.path.join(self._base, os.path.expanduser(text)))

    def _expand(self, where: str, text: str) -> str:
        return _VARIABLE.sub(lambda match: self._variable(where, match), text)

    def _variable(self, where: str, match: re.Match[str]) -> str:
        name = match[1] if match[1] is not None else match[2]
        value = self._environ.get(name)
        if value:
            return value
        if _NAME.fullmatch(name):
            what, fix = f"the environment variable {shorten(name)} is not set", "set it, or write the path"
        else:
            what = f"{quote(match[0])} is not an environment variable, and sftd has no other interpolation"
            fix = "write the value"
        self._refuse(where, what, fix)
        return match[0]

    def _refuse(self, where: str, what: str, fix: str) -> None:
        self.problems.append(Problem(where, what, fix))


def _matches(pattern: str) -> list[str]:
    return sorted(os.path.normpath(path) for path in glob(pattern, recursive=True) if os.path.isfile(path))
