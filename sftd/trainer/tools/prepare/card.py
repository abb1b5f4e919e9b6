"""The card of a tokenised data set: its sources, options, and the treatment of its rows. It has no times or folders, so the
same input gives the same bytes."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sftd
from sftd.domain.text.words import counted
from sftd.trainer.chat.shapes import PLAIN_FIELDS
from sftd.trainer.chat.template import BoundTemplate
from sftd.trainer.chat.tokenizer import tokenizer_digest
from sftd.trainer.tools.prepare.card_text import as_markdown
from sftd.trainer.tools.prepare.overlap import OVERLAPS, REPEATS, Overlap
from sftd.trainer.tools.prepare.row_file import RowFile
from sftd.trainer.tools.prepare.sources.chat_files import ChatSource
from sftd.trainer.tools.prepare.tokenize_pieces import (
    NEAR_EMPTY,
    NOT_TRAINED,
    Done,
    PieceTokenizer,
    TokenizeOptions,
)

_FIELDS_NAMED = 8
# Maximum number of separate reasons, and of rows as examples.
_REASONS, _EXAMPLES = 40, 20
_PLACES = 5
# Maximum number of separate names, such as those of fields.
_NAMES = 200
# Positions and lengths, but not the 8 of UTF-8.
_NUMBER = re.compile(r"(?<![\w-])\d+(?!\w)")


@dataclass
class Counts:
    """Counts of chats and rows. `rejected`, `dropped`: by reason. `unused`: number of chats by unused field or mark.
    `remarks`: sentences about the files. `keys`: 8 bytes for each chat that is not held out. `near_empty`, `over_long`: see
    `Done`; the first places of each are in `places`."""

    chats: int = 0
    truncated: int = 0
    unstopped: int = 0
    as_shown: int = 0
    rewritten: int = 0
    special: int = 0
    unknown: int = 0
    near_empty: int = 0
    over_long: int = 0
    places: dict[str, list[str]] = field(default_factory=lambda: {"near_empty": [], "over_long": []})
    rejected: dict[str, int] = field(default_factory=dict)
    examples: list[dict[str, str]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, int] = field(default_factory=dict)
    templates: dict[str, int] = field(default_factory=dict)
    arguments: dict[str, int] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    keys: bytearray = field(default_factory=bytearray)

    def duplicates(self) -> int:
        """Number of chats that repeat another one word for word."""
        keys = np.frombuffer(self.keys, np.uint64)
        return int(keys.size - np.unique(keys).size)

    def add(self, done: Done, *, is_held_out: bool) -> None:
        """Count a piece. `is_held_out`: it belongs to the data set's own validation split."""
        self.chats += done.chats
        self.unstopped += done.unstopped
        self.as_shown += done.as_shown
        self.rewritten += done.rewritten
        self.special += done.special
        self.unknown += done.unknown
        self.near_empty += len(done.near_empty)
        self.over_long += len(done.over_long)
        for name, found in (("near_empty", done.near_empty), ("over_long", done.over_long)):
            first = self.places[name]
            first += [place.rpartition("/")[2] for place in found[: _PLACES - len(first)]]
        for total, part in (
            (self.dropped, done.dropped),
            (self.shapes, done.shapes),
            (self.templates, done.templates),
            (self.arguments, done.arguments),
            (self.unused, done.unused),
        ):
            for name, count in part.items():
                known = name if name in total or len(total) < _NAMES else "others"
                total[known] = total.get(known, 0) + count
        if not is_held_out:
            self.keys += done.keys
        for place, why in done.rejected:
            reason = reason_of(why)
            if reason not in self.rejected and len(self.rejected) >= _REASONS:
                reason = "other reasons"
            self.rejected[reason] = self.rejected.get(reason, 0) + 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append({"place": place.rpartition("/")[2], "reason": why})


def reason_of(why: str) -> str:
    """The reason without positions, so that the same mistake in another message has the same reason."""
    return _NUMBER.sub("N", why)


def make_card(
    tokenizer: PieceTokenizer,
    model: Path,
    sources: Sequence[ChatSource],
    held_out: Sequence[ChatSource],
    options: TokenizeOptions,
    train: RowFile,
    val: RowFile | None,
    published: Sequence[dict[str, Any]],
    counts: Counts,
    against: Sequence[ChatSource],
    overlap: Overlap,
) -> dict[str, Any]:
    """The card as a JSON object."""
    import tokenizers
    import transformers

    loaded, masker = tokenizer.tokenizer, tokenizer.masker
    template = masker.template
    files = [("train", train), *([("validation", val)] if val is not None else [])]
    same, asked, first = overlap.found()
    named = [*((source, "train") for source in sources), *((source, "validation") for source in held_out)]
    return {
        "format": 1,
        "made_with": {
            "sftd": sftd.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "sources": [
            {"name": source.name, "split": split, "rows": source.rows, "sha256": source.sha256}
            for source, split in named
        ],
        "shapes": counts.shapes,
        "tokenizer": {
            "model": model.resolve().name,
            "digest": tokenizer_digest(loaded),
            "vocab_size": len(loaded),
            "stop_token": masker.stop_token,
        },
        "chat_template": {
            "sha256": template.sha256,
            "from": "a file" if template.chosen.text is not None else "the model folder",
            "chats_by_name": dict(sorted(counts.templates.items())),
            "date": template.chosen.date if template.asks_for_date else None,
            "answers": "marked by the template" if masker.marks_answers else "found by rendering",
            "tool_arguments": dict(sorted(counts.arguments.items())),
            "arguments": dict(options.template_args),
        },
        "options": {
            "max_length": options.max_length,
            "truncation": options.truncation,
            "messages_key": options.messages_key,
            "prompt_key": options.prompt_key,
            "response_key": options.response_key,
            "split": options.split,
            "val_fraction": options.val_fraction,
            "val_rows": options.val_rows,
            "val_split": options.val_split,
            "rewritten": options.rewritten,
            "skip_bad_rows": options.skip_bad_rows,
            "dedupe": options.dedupe,
            "drop_overlap": options.drop_overlap,
        },
        "chats": {
            "used": counts.chats,
            "duplicates": counts.duplicates(),
            "with_special_tokens_in_their_text": counts.special,
            "rejected": sum(counts.rejected.values()),
            "rejected_by_reason": counts.rejected,
            "rejected_first": counts.examples,
            "dropped": sum(counts.dropped.values()),
            "dropped_by_reason": counts.dropped,
            "with_fields_not_used": dict(sorted(counts.unused.items())),
        },
        "answers": {
            "without_stop_token": counts.unstopped,
            "trained_as_shown": counts.as_shown,
            "left_out_because_rewritten": counts.rewritten,
        },
        "near_empty_rows": {
            "trained_tokens_below": NEAR_EMPTY,
            "rows": counts.near_empty,
            "first": counts.places["near_empty"],
        },
        "long_rows": {
            "tokens_above": options.max_length or tokenizer.context,
            "rows": counts.over_long,
            "first": counts.places["over_long"],
        },
        "validation_overlap": {
            "compared_with": [{"name": source.name, "sha256": source.sha256} for source in against],
            "training_rows_with_the_same_chat": same,
            "training_rows_with_the_same_prompt_only": asked,
            "first_training_rows": first,
        },
        "rows_with_characters_that_the_vocabulary_lacks": counts.unknown,
        "outputs": {
            split: {
                "name": file.path.name,
                "sha256": done["sha256"],
                "rows": file.rows,
                "tokens": file.tokens,
                "trained_tokens": file.trained_tokens,
                "trained_share": round(file.trained_tokens / max(1, file.tokens), 6),
                "longest": file.longest,
                "rows_by_length_up_to": file.lengths(),
                "truncated": file.truncated,
                "cut_tokens": file.cut_tokens,
                "cut_trained_tokens": file.cut_trained_tokens,
                "weighted_rows": file.weighted,
            }
            for (split, file), done in zip(files, published, strict=True)
        },
        "warnings": [
            *_warnings(counts, template, [file for _, file in files]),
            *_row_warnings(counts, tokenizer.context, options, [file for _, file in files]),
            *_overlap_warnings(same, asked, first, train),
        ],
    }


def write_card(out: Path, card: dict[str, Any]) -> dict[str, str]:
    """Write the card beside the data, as JSON and Markdown. Returns the fields `card` and `card_text`."""
    paths = {"card": f"{out.name}.card.json", "card_text": f"{out.name}.card.md"}
    texts = {"card": json.dumps(card, indent=2, ensure_ascii=False) + "\n", "card_text": as_markdown(card)}
    for name, text in texts.items():
        partial = out.with_name(paths[name] + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(out.with_name(paths[name]))
    return {name: str(out.with_name(path).resolve()) for name, path in paths.items()}


def _warnings(counts: Counts, template: BoundTemplate, files: Sequence[RowFile]) -> list[str]:
    warnings = list(counts.remarks)
    if template.asks_for_date:
        warnings.append(
            f"the chat template writes the current date; in every row it is {template.chosen.date} (--date sets another)"
        )
    if counts.unstopped:
        warnings.append(
            f"{counted(counts.unstopped, 'answer')} trained without a stop token, so the model does not learn to "
            "stop: the chat template puts no special token directly after them"
        )
    if counts.as_shown:
        warnings.append(
            f"{counted(counts.as_shown, 'answer')} trained as the chat template shows it to later turns, without the model's "
            "output before it (such as an empty think block); --rewritten split trains each as the model writes it"
        )
    if counts.rewritten:
        warnings.append(
            f"{counted(counts.rewritten, 'answer')} not trained, because the chat template rewrites it when other turns follow; "
            "--rewritten split trains each in a separate row"
        )
    if cut := sum(file.cut_trained_tokens for file in files):
        rows = sum(file.truncated for file in files)
        warnings.append(f"truncation has cut {counted(cut, 'token')} of answers off {counted(rows, 'row')}")
    if counts.special:
        warnings.append(
            f"{counted(counts.special, 'chat')} with text in messages, tool calls or tools that the tokenizer reads as "
            "special tokens (such as a stop token), so the model would read it as the chat's structure"
        )
    if counts.unknown:
        warnings.append(
            f"{counted(counts.unknown, 'row')} with characters that the tokenizer's vocabulary lacks, so the model does not "
            "see them"
        )
    duplicates = counts.duplicates()
    if duplicates and REPEATS not in counts.dropped:
        warnings.append(
            f"{duplicates:,} of {counted(len(counts.keys) // 8, 'chat')} repeat another one word for word"
        )
    if not_used := {name: n for name, n in sorted(counts.unused.items()) if name not in PLAIN_FIELDS}:
        shown = [f"{name} ({counted(n, 'chat')})" for name, n in list(not_used.items())[:_FIELDS_NAMED]]
        more = len(not_used) - len(shown)
        warnings.append(
            "sftd does not use " + ", ".join(shown) + (f" and {counted(more, 'more field')}" if more else "")
        )
    if weighted := sum(file.weighted for file in files):
        warnings.append(
            f"{counted(weighted, 'row')} with weights other than 0 and 1: the column loss_weights has the weight of each token"
        )
    if marked := counts.dropped.get(NOT_TRAINED):
        warnings.append(f"{counted(marked, 'row')} marked as not trained: left out")
    for reason, does in ((REPEATS, "repeat an earlier one"), (OVERLAPS, "are in the validation data")):
        if left_out := counts.dropped.get(reason):
            warnings.append(f"{left_out:,} of the training chats {does}: left out")
    return warnings


def _row_warnings(
    counts: Counts, context: int | None, options: TokenizeOptions, files: Sequence[RowFile]
) -> Iterator[str]:
    longest = max(file.longest for file in files)
    if context is not None and longest > context:
        yield (
            f"the longest row has {longest} tokens, but the model was trained with a context of {context}"
            + (
                f"; {_first(counts.over_long, counts.places['over_long'])}"
                if options.max_length is None
                else ""
            )
        )
    # Where most answers are short, as in multiple choice, they are meant to be.
    if 0 < counts.near_empty < sum(file.rows for file in files) / 2:
        shown = _first(counts.near_empty, counts.places["near_empty"])
        yield f"fewer than {NEAR_EMPTY} trained tokens: {shown}"


def _first(rows: int, places: Sequence[str]) -> str:
    return f"{counted(rows, 'row')}, {'such as ' if rows > len(places) else ''}{'; '.join(places)}"


def _overlap_warnings(same: int, asked: int, first: Sequence[int], train: RowFile) -> Iterator[str]:
    rows = f"; the first (from 0) in {train.path.name}: {', '.join(map(str, first))}"
    if same:
        more = f", and {asked:,} with its user messages" if asked else ""
        yield f"{counted(same, 'training row')} with a chat that is also in the validation data{more}{rows}"
    elif asked:
        yield f"{counted(asked, 'training row')} with the user messages of a chat in the validation data{rows}"
