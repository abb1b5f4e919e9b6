"""A data set's card as Markdown."""

from collections.abc import Iterator
from typing import Any


def as_markdown(card: dict[str, Any]) -> str:
    """The card in Markdown."""
    return "\n".join(_lines(card)) + "\n"


def _lines(card: dict[str, Any]) -> Iterator[str]:
    tokenizer, template, chats = card["tokenizer"], card["chat_template"], card["chats"]
    outputs: dict[str, dict[str, Any]] = card["outputs"]
    yield f"# {outputs['train']['name']}"
    yield ""
    made = card["made_with"]
    yield (
        f"Tokenised for {tokenizer['model']} by sftd {made['sftd']} (transformers {made['transformers']}, tokenizers "
        f"{made['tokenizers']}). The assistant's answers and their stop tokens are trained."
    )
    yield ""
    yield from _table(
        ["output", "rows", "tokens", "trained", "share", "longest", "truncated", "tokens cut"],
        [
            [
                f"{split}: {file['name']}",
                *(f"{file[key]:,}" for key in ("rows", "tokens", "trained_tokens")),
                f"{file['trained_share']:.1%}",
                *(f"{file[key]:,}" for key in ("longest", "truncated", "cut_tokens")),
            ]
            for split, file in outputs.items()
        ],
    )
    if card["warnings"]:
        yield "## Warnings"
        yield ""
        yield from (f"- {warning}" for warning in card["warnings"])
        yield ""
    yield "## Chats"
    yield ""
    shapes = ", ".join(f"{name} ({count:,})" for name, count in card["shapes"].items())
    yield (
        f"{chats['used']:,} used ({chats['duplicates']:,} of them duplicates), {chats['rejected']:,} rejected, "
        f"{chats['dropped']:,} dropped. Their shapes: {shapes or 'none'}."
    )
    yield ""
    reasons = [
        *([["rejected", f"{n:,}", why] for why, n in chats["rejected_by_reason"].items()]),
        *([["dropped", f"{n:,}", why] for why, n in chats["dropped_by_reason"].items()]),
    ]
    if reasons:
        yield from _table(["", "chats", "reason"], reasons)
    if chats["with_fields_not_used"]:
        rows = [[name, f"{n:,}"] for name, n in chats["with_fields_not_used"].items()]
        yield from _table(["field not used", "chats"], rows)
    if chats["rejected_first"]:
        yield "The first that were rejected:"
        yield ""
        yield from (f"- {one['place']}: {one['reason']}" for one in chats["rejected_first"])
        yield ""
    yield "## Lengths"
    yield ""
    lengths = sorted({int(n) for f in outputs.values() for n in f["rows_by_length_up_to"] if n != "more"})
    names = [*map(str, lengths), "more"]
    yield from _table(
        ["tokens up to", *(f"{split} rows" for split in outputs)],
        [
            [name, *(f"{file['rows_by_length_up_to'].get(name, 0):,}" for file in outputs.values())]
            for name in names
            if any(name in file["rows_by_length_up_to"] for file in outputs.values())
        ],
    )
    yield "## Made of"
    yield ""
    yield from _table(
        ["source", "split", "rows", "sha256"],
        [
            [source["name"], source["split"], f"{source['rows']:,}", source["sha256"]]
            for source in card["sources"]
        ],
    )
    rows = [
        ["tokenizer", f"{tokenizer['digest']} ({tokenizer['vocab_size']:,} tokens)"],
        ["stop token", tokenizer["stop_token"] or "none that is special"],
        ["chat template", f"{template['sha256']}, of {template['from']}; answers are {template['answers']}"],
        *([["date in the template", template["date"]]] if template["date"] else []),
        *([f"chats by template: {name}", f"{n:,}"] for name, n in template["chats_by_name"].items()),
        *(
            [f"chats by form of tool arguments: {form}", f"{n:,}"]
            for form, n in template["tool_arguments"].items()
        ),
        *([f"template: {name}", value] for name, value in template["arguments"].items()),
        *([name, value] for name, value in card["options"].items() if value not in (None, False)),
        *([f"sha256 of {file['name']}", file["sha256"]] for file in outputs.values()),
    ]
    yield from _table(["what", "value"], [[name, str(value)] for name, value in rows])


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for cells in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
    yield ""
