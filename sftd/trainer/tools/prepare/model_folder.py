"""Finds or downloads the Hugging Face model folder of a run."""

import json
import re
from pathlib import Path
from typing import Any

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.chat.tokenizer import check_has_tokenizer
from sftd.trainer.tools.prepare.demo_model import DEMO_NAME, prepare_demo_model
from sftd.trainer.tools.protocol import EventWriter

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


def prepare_model(name_or_path: str, cache: Path, events: EventWriter) -> dict[str, Any]:
    """Return the `done` fields of a usable model folder: `path` (absolute), `source` and `reused`.

    `name_or_path` is `smollm2` (the demo's model), a local folder in Hugging Face format, which is checked and used in
    place, or a name on the Hugging Face hub, which is downloaded below `cache`. Raises PrepareError when the model does not
    exist or cannot be downloaded.
    """
    local = Path(name_or_path).expanduser()
    if name_or_path == DEMO_NAME:
        folder, reused = prepare_demo_model(cache, events)
        source = "demo"
    elif local.is_dir():
        folder, reused, source = local, True, "folder"
    elif _HUB_NAME.fullmatch(name_or_path) and not local.exists():
        folder, reused, source = _download_from_hub(name_or_path, cache, events), False, "hub"
    else:
        raise PrepareError(
            f"There is no model folder {name_or_path!r}. Give a folder with a config.json, weights and a "
            f"tokenizer, the name of a model on the Hugging Face hub, or {DEMO_NAME}."
        )
    check_model_folder(folder)
    return {"path": str(folder.resolve()), "source": source, "reused": reused}


def check_model_folder(folder: Path) -> None:
    """Raise PrepareError unless `folder` has a config.json, all weight files and a tokenizer."""
    config = folder / "config.json"
    if not config.is_file():
        raise PrepareError(f"{folder} is not a model folder in Hugging Face format: it has no config.json.")
    _read_json_object(config)
    weights = [name for name in _WEIGHT_FILES if (folder / name).is_file()]
    indexes = [index for name in _WEIGHT_FILES if (index := folder / f"{name}.index.json").is_file()]
    if not weights and not indexes:
        raise PrepareError(
            f"The model folder {folder} has no weights: {' or '.join(_WEIGHT_FILES)} (or its index of "
            "shards) is missing. Download the model again."
        )
    if not weights:
        shards = _read_json_object(indexes[0]).get("weight_map", {})
        missing = sorted({name for name in shards.values() if not (folder / name).is_file()})
        if missing:
            raise PrepareError(
                f"The model folder {folder} lacks {len(missing)} of the weight files that {indexes[0].name} "
                f"names, first {missing[0]}. Download the model again."
            )
    check_has_tokenizer(folder)


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise PrepareError(f"{path} is not valid JSON ({error}). Download the model again.") from error
    if not isinstance(content, dict):
        raise PrepareError(f"{path} holds no JSON object. Download the model again.")
    return content


def _download_from_hub(name: str, cache: Path, events: EventWriter) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    events.progress("download", name=name)
    fix = "Or download it elsewhere, copy its folder here, and give that folder's path."
    try:
        return Path(snapshot_download(name, cache_dir=cache / "hub", allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise PrepareError(
            f"The model {name} is gated: accept its terms on the Hugging Face hub and log in there "
            f"(set HF_TOKEN). {fix}"
        ) from error
    except RepositoryNotFoundError as error:
        raise PrepareError(
            f"There is neither a local folder {name} nor a model of that name on the Hugging Face hub "
            "(a private one needs HF_TOKEN). Check the spelling."
        ) from error
    except Exception as error:  # the hub's network library, and so its errors, vary by version
        raise PrepareError(
            f"There is no local folder {name}, and the Hugging Face hub could not be reached to download "
            f"a model of that name ({type(error).__name__}: {_first_line(error)}). {fix}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no details"])[0]
