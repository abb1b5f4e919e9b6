"""Find models in the local cache of the Hugging Face hub. Downloads nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

_ID = re.compile(r"(?:[A-Za-z0-9_-][\w.-]*/)?[A-Za-z0-9_-][\w.-]*", re.ASCII)


def is_hub_id(text: str) -> bool:
    """Whether a text has the form of a hub id: `name` or `organisation/name`."""
    return _ID.fullmatch(text) is not None


def cached_model(hub_id: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """Folder of the cached snapshot of the model's branch `main`; None if it was never downloaded. The cache is the one of
    huggingface_hub: HF_HUB_CACHE, else in HF_HOME, else in the user's cache."""
    default = Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    home = Path(environ.get("HF_HOME") or default)
    cache = environ.get("HF_HUB_CACHE") or environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    folder = Path(os.path.expanduser(cache)) / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        return None
    snapshot = folder / "snapshots" / commit
    return os.path.abspath(snapshot) if re.fullmatch(r"\w+", commit) and snapshot.is_dir() else None
