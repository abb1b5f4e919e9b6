"""What is known of a run before it is queued, beside its spec. `wire/preflight.py` reads it; rules judge it."""

from __future__ import annotations

from typing import Any

import msgspec

from sftd.domain.data.chat_template import ChatTemplate
from sftd.domain.data.facts import DataFacts
from sftd.domain.errors import Problem
from sftd.domain.model.files import ModelFiles
from sftd.domain.model.shape import ModelShape


class HostDevices(msgspec.Struct, frozen=True):
    """The devices of a host that may start runs."""

    name: str
    gpus: int
    cpus: int


class SaveFolder(msgspec.Struct, frozen=True, kw_only=True):
    """Where checkpoints go. `error` is why nothing can be written there. `unmounted` is the folder of the root file system in
    which it and folders above it are missing. `free` bytes are free in `above`, the nearest folder that exists; None where
    nothing is asked about room."""

    path: str
    error: str = ""
    unmounted: str = ""
    above: str = ""
    free: int | None = None


class Parent(msgspec.Struct, frozen=True, kw_only=True):
    """The run that a fork starts from. `model` is its model's shape, and `model_files` its model folder as recorded; None
    without a record, and where the fork names another folder. The fork may have a changed folder with `may_change_files`.

    `checkpoint` is the step of the checkpoint that it starts from, and `dtype` what that was trained in, empty where that is not
    known; None starts from the pretrained model. `is_direct`: some of it was trained without a daemon."""

    run_id: str
    model: dict[str, Any]
    model_files: ModelFiles | None
    may_change_files: bool
    checkpoint: int | None
    dtype: str
    is_direct: bool


class SubmitFacts(msgspec.Struct, frozen=True, kw_only=True):
    """None, or empty, is what was not read; rules have nothing to say of it. `unreadable` is why files could not be read.

    `train` and `val` are the data files. `trained_on` are the validation files whose contents are also a training file's,
    `rendered_differently` two training files with different chat templates. `hosts` are those that may start the run; `own_gpus`
    are those of this host, where the run starts at once. `parent` is that of a fork. The judge adds `planned_steps`, and `first_step`, the step that a fork
    starts from.
    """

    unreadable: list[Problem] = []
    shape: ModelShape | None = None
    model_files: ModelFiles | None = None
    has_tokenizer: bool | None = None
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
