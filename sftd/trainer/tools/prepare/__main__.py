"""Command line of the preparation tools; reports as JSON lines on standard output.

    model NAME_OR_PATH --cache DIR                    find, download or convert a model folder
    stdlib-chats OUT_DIR [--rows N]                   write the demo's chats
    tokenize SOURCE... --model FOLDER --out FILE      chats to token ids and labels in Parquet
    show FILE --model FOLDER [--row K]                one tokenised row as text

After success, the last line has the event `done` (`row` for `show`). Exit codes: 0; 2 with a message on standard error for
an error that the user can fix; any other code is a defect.
"""

import argparse
import datetime as dt
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sftd.domain.data.chat_template import DEFAULT_DATE
from sftd.trainer.chat.errors import PrepareError
from sftd.trainer.tools.protocol import EventWriter, claim_stdout

_USER_ERROR = 2
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    events = claim_stdout()
    try:
        _run(arguments, events)
    except (PrepareError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return _USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    return 0


def _run(arguments: argparse.Namespace, events: EventWriter) -> None:
    # Each command imports only its own module, because the libraries take seconds to import.
    if arguments.command == "model":
        from sftd.trainer.tools.prepare.model_folder import prepare_model

        events.emit("done", **prepare_model(arguments.name_or_path, arguments.cache, events))
    elif arguments.command == "stdlib-chats":
        from sftd.trainer.tools.prepare.stdlib_chats import write_stdlib_chats

        events.emit("done", **write_stdlib_chats(arguments.out_dir, rows=arguments.rows))
    elif arguments.command == "tokenize":
        if not arguments.trust_remote_code:
            importlib.import_module("sftd.trainer.chat.without_torch")
        from sftd.trainer.tools.prepare.tokenize_files import TokenizeOptions, tokenize_files

        options = TokenizeOptions(
            max_length=arguments.max_length,
            truncation=arguments.truncation,
            messages_key=arguments.messages_key,
            prompt_key=arguments.prompt_key,
            response_key=arguments.response_key,
            split=arguments.split,
            val_fraction=arguments.val_fraction,
            val_rows=arguments.val_rows,
            val_split=arguments.val_split,
            val_out=arguments.val_out,
            rewritten=arguments.rewritten,
            skip_bad_rows=arguments.skip_bad_rows,
            dedupe=arguments.dedupe,
            against=tuple(arguments.against),
            drop_overlap=arguments.drop_overlap,
            template_args=dict(map(_template_arg, arguments.template_arg)),
            template_text=None
            if arguments.chat_template is None
            else _template_text(arguments.chat_template),
            template_name=arguments.template,
            date=_date(arguments.date),
            trust_remote_code=arguments.trust_remote_code,
            workers=arguments.workers,
        )
        done = tokenize_files(arguments.sources, arguments.model, arguments.out, options, events)
        events.emit("done", **done)
    else:
        from sftd.trainer.tools.prepare.show_row import show_row

        trust = arguments.trust_remote_code
        events.emit(
            "row", **show_row(arguments.file, arguments.model, arguments.row, trust_remote_code=trust)
        )


def _template_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PrepareError(f"The chat template {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise PrepareError(f"The chat template {path} is not UTF-8 text ({error.reason}).") from error
    if "{" not in text:
        raise PrepareError(f"{path} is not a chat template: it has no Jinja expression.")
    return text


def _date(text: str) -> str:
    try:
        return dt.date.fromisoformat(text).isoformat()
    except ValueError:
        raise PrepareError(f"--date {text} is not a date such as {DEFAULT_DATE}.") from None


def _template_arg(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise PrepareError(f"The template argument {text!r} is not NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        # An unquoted word is a string, except Python's constants: in a template, any non-empty string is true.
        return name, {"True": True, "False": False, "None": None}.get(value, value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.prepare", description="Prepare model and data."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    model = commands.add_parser("model", help="find, download or convert a model folder")
    model.add_argument("name_or_path", help="smollm2, a local folder, or a name on the Hugging Face hub")
    model.add_argument("--cache", type=Path, required=True, help="folder for downloads")

    chats = commands.add_parser("stdlib-chats", help="write the demo's chats from Python's own documentation")
    chats.add_argument("out_dir", type=Path)
    chats.add_argument("--rows", type=int, help="maximum number of chats in both files together")

    tokenize = commands.add_parser("tokenize", help="turn chats into token ids and labels")
    tokenize.add_argument(
        "sources",
        type=Path,
        nargs="+",
        help="chat files (.jsonl, .json, .csv, .parquet, .arrow) or data set folders",
    )
    tokenize.add_argument("--model", type=Path, required=True, help="model folder whose tokenizer is used")
    tokenize.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    tokenize.add_argument("--max-length", type=int, help="longest row, in tokens")
    tokenize.add_argument("--truncation", choices=("right", "left", "error", "drop"), default="right")
    tokenize.add_argument("--messages-key", help="field or column that holds the chat")
    tokenize.add_argument("--prompt-key", help="field of the prompt, with --response-key")
    tokenize.add_argument("--response-key", help="field of the response, with --prompt-key")
    tokenize.add_argument("--split", default="train", help="split of a data set folder")
    tokenize.add_argument("--val-fraction", type=float, help="share of the chats that goes to --val-out")
    tokenize.add_argument("--val-rows", type=int, help="number of rows that go to --val-out")
    tokenize.add_argument("--val-split", help="split of a data set folder that goes to --val-out")
    tokenize.add_argument("--val-out", type=Path, help="Parquet file of the held-out chats")
    tokenize.add_argument("--rewritten", choices=("refuse", "mask", "split"), default="refuse")
    tokenize.add_argument("--skip-bad-rows", action="store_true", help="leave unusable rows out")
    tokenize.add_argument("--dedupe", action="store_true", help="leave out chats that repeat an earlier one")
    tokenize.add_argument("--against", type=Path, action="append", default=[], help="validation chats")
    tokenize.add_argument("--drop-overlap", action="store_true", help="leave out what validation data has")
    tokenize.add_argument(
        "--template-arg", action="append", default=[], help="NAME=JSON, a variable of the chat template"
    )
    chosen = tokenize.add_mutually_exclusive_group()
    chosen.add_argument("--chat-template", type=Path, help="Jinja file used instead of the model's template")
    chosen.add_argument("--template", help="name of one of the model's chat templates")
    tokenize.add_argument("--date", default=DEFAULT_DATE, help="current date for the template")
    tokenize.add_argument("--workers", type=int, help="processes; by default one per core for large files")
    tokenize.add_argument("--trust-remote-code", action="store_true", help="run the tokenizer's own code")

    show = commands.add_parser("show", help="show one tokenised row")
    show.add_argument("file", type=Path)
    show.add_argument("--model", type=Path, required=True)
    show.add_argument("--row", type=int, default=0, help="counted from 0")
    show.add_argument("--trust-remote-code", action="store_true")
    return parser


if __name__ == "__main__":
    sys.exit(main())
