"""Tokenises chat files to Parquet: the data set of a training run, and a card that describes its making."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.chat.tokenizer import tokenizer_digest
from sftd.trainer.tools.prepare.card import Counts, make_card, write_card
from sftd.trainer.tools.prepare.overlap import OVERLAPS, REPEATS, Overlap, Repeats, hold_out_files
from sftd.trainer.tools.prepare.row_file import RowFile, Spool
from sftd.trainer.tools.prepare.sources.chat_files import ChatSource, open_source, pieces
from sftd.trainer.tools.prepare.sources.dataset_folder import expand
from sftd.trainer.tools.prepare.splitting import SmallestKeys, fraction
from sftd.trainer.tools.prepare.tokenize_pieces import PieceTokenizer, Row, TokenizeOptions
from sftd.trainer.tools.prepare.workers import default_workers, tokenized
from sftd.trainer.tools.protocol import EventWriter

__all__ = ["TokenizeOptions", "tokenize_files"]


@dataclass
class _Job:
    """The inputs and outputs. `held_out`: sources of a separate validation split."""

    sources: list[ChatSource]
    held_out: list[ChatSource]
    tokenizer: PieceTokenizer
    model: Path
    options: TokenizeOptions
    events: EventWriter
    train: RowFile
    val: RowFile | None
    spool: Spool | None
    overlap: Overlap
    repeats: Repeats | None
    counts: Counts = field(default_factory=Counts)


def tokenize_files(
    sources: Sequence[Path], model: Path, out: Path, options: TokenizeOptions, events: EventWriter
) -> dict[str, Any]:
    """Write `out`, and `options.val_out`, with one row for each conversation of the sources, in their order.

    A row holds `input_ids`, `attention_mask` (all ones) and unshifted `labels` (-100 where not trained). Chats are neither
    packed nor padded. The files' metadata has JSON under the key `sftd` that names the tokenizer, the template and the
    sources. The same input gives the same bytes for any number of processes. Only a few pieces of the files and one row
    group are in memory.

    Returns the fields of the `done` event: those of `out` (`path`, `rows`, `tokens`, `trained_tokens`, `max_length`,
    `sha256`), the same under `val` (null without a split), and for both together `truncated`, `dropped`, `rejected`,
    `stop_token`, `tokenizer_digest`, `warnings`, and the paths of the card (`card`, `card_text`). Raises PrepareError.
    """
    options = _checked(sources, out, options)
    found, remarks = expand(sources, options.split)
    opened = [open_source(file.path, file.name) for file in found]
    held_out: list[ChatSource] = []
    if options.val_split is not None:
        folders = [path for path in sources if path.is_dir()]
        found, more = expand(folders, options.val_split)
        remarks += [remark for remark in more if remark not in remarks]
        held_out = [open_source(file.path, file.name) for file in found]
        if {source.path for source in held_out} & {source.path for source in opened}:
            raise PrepareError(
                f"The split {options.val_split!r} is trained on and validated on. Choose another with --split or --val-split."
            )
    overlap = Overlap()
    against = hold_out_files(overlap, options.against, options.row_keys)
    _refuse_overwriting(out, options, opened + held_out + against)
    tokenizer = PieceTokenizer(model, options)
    metadata = _metadata(tokenizer, opened, held_out, options)
    with contextlib.ExitStack() as stack:
        train = RowFile(out, _dump(metadata | {"split": "train"}))
        stack.callback(train.discard)
        val = spool = None
        if options.val_out is not None:
            val = RowFile(options.val_out, _dump(metadata | {"split": "val"}))
            stack.callback(val.discard)
        if options.val_rows is not None:
            spool = Spool(out.with_name(out.name + ".spool.partial"))
            stack.callback(spool.discard)
        repeats = Repeats() if options.dedupe else None
        job = _Job(opened, held_out, tokenizer, model, options, events, train, val, spool, overlap, repeats)
        job.counts.remarks += remarks
        _write_rows(job)
        for file in (train, val):
            if file is not None:
                file.close()
                _refuse_empty(file, job)
        published = [file.publish() for file in (train, val) if file is not None]
    card = make_card(
        tokenizer, model, opened, held_out, options, train, val, published, job.counts, against, overlap
    )
    return published[0] | {
        "val": published[1] if val is not None else None,
        "truncated": job.counts.truncated,
        "dropped": sum(job.counts.dropped.values()),
        "rejected": sum(job.counts.rejected.values()),
        "stop_token": tokenizer.masker.stop_token,
        "tokenizer_digest": metadata["tokenizer_digest"],
        "warnings": card["warnings"],
        **write_card(out, card),
    }


def _write_rows(job: _Job) -> None:
    seen = 0
    total = sum(source.rows for source in job.sources + job.held_out)
    keys = SmallestKeys(job.options.val_rows) if job.options.val_rows is not None else None
    # The held-out rows come first, so that training rows can be compared with them.
    for is_held_out, sources in ((True, job.held_out), (False, job.sources)):
        for rows, count in _tokenized(job, sources):
            kept = [row for row in rows if not _left_out(job, job.repeats, row, REPEATS)]
            for row in kept:
                if is_held_out:
                    _append(job, row, to_val=True)
                elif keys is not None:
                    keys.add(row.key)
                else:
                    _append(job, row, to_val=fraction(row.key) < (job.options.val_fraction or 0.0))
            if job.spool is not None:
                job.spool.append(kept)
            seen += count
            job.events.progress("tokenize", rows=seen, total=total)
    if job.spool is not None and keys is not None:
        for to_val in (True, False) if job.options.drop_overlap else (None,):
            for row in job.spool.rows():
                if to_val is None or to_val == (row.key in keys):
                    _append(job, row, to_val=row.key in keys)


def _append(job: _Job, row: Row, *, to_val: bool) -> None:
    if to_val and job.val is not None:
        job.overlap.hold_out(row.loose, row.prompt)
        job.val.append(row)
    elif not _left_out(job, job.overlap if job.options.drop_overlap else None, row, OVERLAPS):
        job.overlap.train(row)
        job.train.append(row)
    else:
        return
    job.counts.truncated += row.cut > 0


def _left_out(job: _Job, known: Repeats | Overlap | None, row: Row, reason: str) -> bool:
    if known is None or row not in known:
        return False
    job.counts.dropped[reason] = job.counts.dropped.get(reason, 0) + 1
    return True


def _tokenized(job: _Job, sources: Sequence[ChatSource]) -> Iterator[tuple[list[Row], int]]:
    """(rows to write, number of rows read) of each piece of the files."""
    if not sources:
        return
    # One pool of workers for all files, because a data set often has many small ones.
    workers = job.options.workers or default_workers(sum(source.path.stat().st_size for source in sources))
    parts = (piece for source in sources for piece in pieces(source, job.options.row_keys))
    for done in tokenized(parts, job.tokenizer, job.model, job.options, workers):
        job.counts.add(done, is_held_out=sources is job.held_out)
        yield done.rows, done.seen


def _metadata(
    tokenizer: PieceTokenizer,
    sources: Sequence[ChatSource],
    held_out: Sequence[ChatSource],
    options: TokenizeOptions,
) -> dict[str, Any]:
    loaded = tokenizer.tokenizer
    return {
        "format": 1,
        "tokenizer_digest": tokenizer_digest(loaded),
        "chat_template_sha256": tokenizer.masker.template.sha256,
        "chat_template": msgspec.to_builtins(options.chat_template),
        "vocab_size": len(loaded),
        "sources": [
            {"name": source.name, "rows": source.rows, "sha256": source.sha256}
            for source in [*sources, *held_out]
        ],
        "max_length": options.max_length,
        "truncation": options.truncation,
        "val_fraction": options.val_fraction,
        "val_rows": options.val_rows,
        "val_split": options.val_split,
        "rewritten": options.rewritten,
    }


def _checked(sources: Sequence[Path], out: Path, options: TokenizeOptions) -> TokenizeOptions:
    if options.max_length is not None and options.max_length < 2:
        raise PrepareError(f"The greatest length is {options.max_length} tokens; it must be at least 2.")
    ways = [options.val_fraction, options.val_rows, options.val_split]
    given = sum(way is not None for way in ways)
    if given > 1:
        raise PrepareError(
            "The validation split has more than one option: give a fraction, a number of rows, or a split of the data set."
        )
    if given == 0 and options.val_out is not None:
        raise PrepareError(
            "The validation file needs a fraction of the chats, a number of rows, or a split of the data set folder."
        )
    if given == 1 and options.val_out is None:
        options = replace(options, val_out=out.with_name(f"{out.stem}.val{out.suffix}"))
    if (options.prompt_key is None) != (options.response_key is None):
        raise PrepareError("Name both the prompt's and the response's field, or neither.")
    if options.prompt_key is not None and options.messages_key is not None:
        raise PrepareError("Name either the field of the messages, or the fields of prompt and response.")
    if options.val_fraction is not None and not 0.0 < options.val_fraction < 1.0:
        raise PrepareError(f"The validation fraction is {options.val_fraction}; it must be between 0 and 1.")
    if options.val_rows is not None and options.val_rows < 1:
        raise PrepareError(f"The validation rows are {options.val_rows}; there must be at least 1.")
    if options.val_split is not None and not any(path.is_dir() for path in sources):
        raise PrepareError(
            "A named validation split needs a data set folder, but none of the sources is a folder."
        )
    if options.drop_overlap and options.val_fraction is not None:
        raise PrepareError(
            "A fraction for validation is chosen while training rows are written, so these cannot be compared with it. "
            "Use a number of rows."
        )
    if options.workers is not None and options.workers < 1:
        raise PrepareError(f"{options.workers} workers are too few; there must be at least 1.")
    return options


def _refuse_overwriting(out: Path, options: TokenizeOptions, sources: Sequence[ChatSource]) -> None:
    written = [out.resolve()] + ([options.val_out.resolve()] if options.val_out is not None else [])
    read = {source.path.resolve() for source in sources}
    for path in written:
        if path.is_dir():
            raise PrepareError(
                f"{path} is a folder. Name the file to write, such as {path / 'train.parquet'}."
            )
    if len({*written, *read}) < len(written) + len(read):
        raise PrepareError(
            f"A file to write ({', '.join(map(str, written))}) is also another of the files named."
        )


def _refuse_empty(file: RowFile, job: _Job) -> None:
    if file.rows:
        return
    options, counts = job.options, job.counts
    if file.path == options.val_out:
        if options.val_fraction is None:
            raise PrepareError("The validation split is empty: none of its chats is usable.")
        raise PrepareError(
            f"No chat fell into the validation fraction of {options.val_fraction}. Increase it, or give more chats."
        )
    reason = "the sources hold no chats"
    if job.val is not None and job.val.rows and not job.held_out and OVERLAPS not in counts.dropped:
        reason = "all chats fell into the validation " + (
            f"fraction of {options.val_fraction}"
            if options.val_rows is None
            else f"rows ({options.val_rows})"
        )
    elif dropped := sum(counts.dropped.values()):
        limit = (
            "" if options.max_length is None else f", at the greatest length of {options.max_length} tokens"
        )
        reason = f"{dropped} rows were dropped{limit} ({', '.join(counts.dropped)})"
    elif counts.rejected:
        reason = (
            f"none of the {sum(counts.rejected.values())} rows can be used ({next(iter(counts.rejected))})"
        )
    raise PrepareError(f"There is nothing to train on: {reason}.")


def _dump(metadata: dict[str, Any]) -> bytes:
    return json.dumps(metadata, sort_keys=True).encode()
