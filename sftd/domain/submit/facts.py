"""Facts of a run before it is queued, besides its spec. `wire/preflight.py` reads them; rules check them."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.data.facts import DataFacts, SourceFacts
from sftd.domain.errors import Problem
from sftd.domain.model.files import ModelFiles
from sftd.domain.model.peft import PeftAdapter
from sftd.domain.model.shape import ModelShape
from sftd.domain.spec.spec import Spec


class HostDevices(msgspec.Struct, frozen=True):
    """The number of devices of a host that may start runs."""

    name: str
    gpus: int
    cpus: int


class SaveFolder(msgspec.Struct, frozen=True, kw_only=True):
    """The folder for checkpoints. `error` is the reason why it is not writable. `unmounted` is a folder on the root file system
    below which the path does not exist. `free` is the number of free bytes in `above`, the nearest existing folder; None if
    space is not checked."""

    path: str
    error: str = ""
    unmounted: str = ""
    above: str = ""
    free: int | None = None


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """The run that a fork starts from. `model` is its model's shape. `model_files` is the record of its model folder, None
    without a record or if the fork uses another folder; `own_files` is that of the parent's folder in any case. `spec` is the
    parent's, `sources` are those of its mixture. With `may_change_files` a changed folder is allowed.

    `checkpoint` is the step of the fork's checkpoint, None for the pretrained model. `dtype` is the training dtype of the
    checkpoint, empty if unknown. `is_direct`: at least part of the parent was trained without a daemon."""

    run_id: str
    model: dict[str, Any]
    model_files: ModelFiles | None
    own_files: ModelFiles | None
    spec: Spec
    may_change_files: bool
    checkpoint: int | None
    dtype: str
    is_direct: bool
    sources: tuple[SourceFacts, ...] = ()


class SubmitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """Facts for the rules. A fact that was not read is None or empty, and rules ignore it. `unreadable` are the problems of
    files that could not be read.

    `has_checkpoint`: the run starts from a checkpoint, so `model.lora.adapter` is not read; otherwise `adapter` is that folder.

    `train` and `val` are the data files. `trained_on` are validation files with the same contents as a training file.
    `rendered_differently` are two training files with different chat templates. `hosts` may start the run. `own_gpus` is the
    number of GPUs of this host, if the run starts here at once. `parent` is set for a fork. The judge adds `planned_steps`
    and `first_step`, the step from which a fork starts.
    """

    unreadable: list[Problem] = []
    shape: ModelShape | None = None
    model_files: ModelFiles | None = None
    has_tokenizer: bool | None = None
    has_checkpoint: bool = False
    adapter: PeftAdapter | None = None
    train: DataFacts | None = None
    val: DataFacts | None = None
    trained_on: list[str] = []
    template: ChatTemplate | None = None
    rendered_differently: tuple[str, str] | None = None
    save_folder: SaveFolder | None = None
    hosts: list[HostDevices] = []
    own_gpus: int | None = None
    parent: Parent | None = None
    planned_steps: int = 0
    first_step: int = 0


NOTHING = SubmitFacts()
