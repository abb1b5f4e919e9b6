"""Print docs/coming-from.md from the table of other trainers' names:

python scripts/coming_from.py > docs/coming-from.md
"""

from __future__ import annotations

from collections.abc import Iterator

from sftd.domain.spec.aliases import ALIASES
from sftd.domain.spec.other_trainers import TABLE, TOOLS

INTRODUCTION = """\
# Coming from another trainer

Made by `python scripts/coming_from.py > docs/coming-from.md` from `sftd/domain/spec/other_trainers.py`; a test fails when it is out of
date.

sftd trains a model, or adapters beside it (LoRA and QLoRA: [lora.md](lora.md)), on labelled tokens (SFT). It has no preference or
reward training. Data is tokenised before: `sftd prepare` reads chats and writes the Parquet files that `data.train_files` names.

`sftd submit` recognises the config of another trainer and answers with this mapping. `sftd config NAME` looks one name up.

| here | as |
|---|---|
| `data.train_batch_size` | the batch of one optimizer step over all GPUs; not of one GPU |
| `training.micro_batch_size_per_gpu` | samples of one forward and backward on one GPU; accumulation follows from the two |
| `trainer.val_check_interval`, `trainer.save_interval` | steps; not epochs or shares of them |
| paths | start at the folder where you submit, not at the config's |

A name with no counterpart is refused if it asks for something: null, false, 0 and the values listed as accepted are not refused.
An ignored name is accepted with a warning.
"""


def markdown() -> str:
    """The whole page."""
    lines = [INTRODUCTION]
    for letter, tool in TOOLS.items():
        lines += [f"## {tool}", "", f"| {tool} | here | remark |", "|---|---|---|", *_rows(letter), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(letter: str) -> Iterator[str]:
    if TOOLS[letter] == "verl":
        for name, alias in ALIASES.items():
            if alias.keys:
                yield f"| `{name}` | {', '.join(f'`{key}`' for key in alias.keys)} | accepted as it is |"
    # Names with the same answer share a row.
    names: dict[tuple[str, str], list[str]] = {}
    for row in TABLE:
        if letter in row.tools:
            here = f"`{row.here}`" if row.here else "ignored" if row.harmless else "no counterpart"
            neutral = ", ".join(f"`{value}`" for value in row.neutral)
            remark = "; ".join(filter(None, (row.note, neutral and f"accepted: {neutral}")))
            names.setdefault((here, remark), []).append(f"`{row.name}`")
    for (here, remark), same in names.items():
        yield f"| {', '.join(same)} | {here} | {remark} |"


if __name__ == "__main__":
    print(markdown(), end="")
