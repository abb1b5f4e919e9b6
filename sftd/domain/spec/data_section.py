"""The section `data`, and the entries of its lists."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sftd.domain.spec.sections import NonNegative, Section, Size


class Source(Section, frozen=True):
    """An entry of `data.sources`: files with a share of their own."""

    name: Annotated[str, Meta(description="name of the source, in events and metrics")]
    files: Annotated[list[str], Meta(description="Parquet files, as train_files")]
    weight: Annotated[
        NonNegative | None, Meta(description="share of the source, beside the weights of the others")
    ] = None
    epochs: Annotated[
        Annotated[float, Meta(gt=0.0)] | None,
        Meta(description="in place of weights: how often the source is read; 1 when not set"),
    ] = None
    val_files: Annotated[list[str], Meta(description="Parquet files to validate on, as train_files")] = (
        msgspec.field(default_factory=list)
    )
    max_rows: Annotated[Size | None, Meta(description="use only this many rows, the first ones")] = None
    on_exhausted: Annotated[
        Literal["repeat", "stop"],
        Meta(description="with a weight, after the last row: begin again, or leave the share to the others"),
    ] = "repeat"


class Stage(Section, frozen=True):
    """An entry of `data.stages`: other weights of sources up to and with a step."""

    until_step: Annotated[Size, Meta(description="last step of the stage")]
    weights: Annotated[
        dict[str, NonNegative],
        Meta(description="weights by name of the source; the others keep their own"),
    ]


class Data(Section, frozen=True):
    """`data`: training and validation data. Parquet with `input_ids`, `attention_mask`, `labels` (see `sftd prepare`)."""

    train_files: Annotated[
        list[str],
        Meta(description="Parquet files to train on; patterns and folders are expanded at submit"),
    ] = msgspec.field(default_factory=list)
    val_files: Annotated[list[str], Meta(description="Parquet files to validate on, as train_files")] = (
        msgspec.field(default_factory=list)
    )
    sources: Annotated[
        list[Source],
        Meta(description="a mixture, in place of train_files: a list of sources with shares of their own"),
    ] = msgspec.field(default_factory=list)
    weights_by: Annotated[
        Literal["rows", "tokens"],
        Meta(description="whether the weights of sources are shares of the rows or of the trained tokens"),
    ] = "rows"
    stages: Annotated[
        list[Stage],
        Meta(
            description="a curriculum: a list of stages with other weights; after the last one the weights of sources apply"
        ),
    ] = msgspec.field(default_factory=list)
    train_batch_size: Annotated[
        Size, Meta(description="samples per optimizer step over all GPUs: the global or effective batch")
    ] = 64
    sequence_length: Annotated[
        Size, Meta(description="longest sequence in tokens; longer rows are truncated")
    ] = 2048
    truncation: Annotated[
        Literal["right", "left", "error"],
        Meta(description="end at which rows longer than sequence_length are cut; error refuses them"),
    ] = "right"
    shuffle: Annotated[
        bool, Meta(description="new order in each epoch, a function of (seed, epoch) only")
    ] = True

    @property
    def all_train_files(self) -> list[str]:
        """The files to train on, those of sources in their order."""
        return [*self.train_files, *(file for source in self.sources for file in source.files)]

    @property
    def all_val_files(self) -> list[str]:
        """The files to validate on: those without a source, then those of sources in their order."""
        return [*self.val_files, *(file for source in self.sources for file in source.val_files)]
