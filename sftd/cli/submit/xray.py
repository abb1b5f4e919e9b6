"""The mask X-ray of `sftd submit`: the trained tokens of a few rows, and the shares over all rows."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from sftd.cli.terminal import output
from sftd.domain.text.words import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console
    from rich.text import Text

    from sftd.domain.spec.spec import Spec
    from sftd.wire.preflight import Preflight

_ROWS = 3
# Characters shown of a part of a row: its beginning and its end.
_HEAD, _TAIL = 110, 50
# Ids shown of a part without a tokenizer.
_IDS = 12


def show(spec: Spec, found: Preflight, out: Console, device: str) -> None:
    """Print the X-ray. `device` is `cuda` or `cpu`; it decides the padded lengths."""
    from rich.padding import Padding

    path = spec.data.all_train_files[0]
    rows = list(_rows(spec, path))
    texts = _texts(spec.model.partial_pretrain, [ids for row in rows for ids, _ in row])
    out.print(
        f"[bold]What is trained[/] is underlined, in « »; the first {f'{len(rows)} rows' if len(rows) > 1 else 'row'} of "
        f"{output.escape(path)}:",
        soft_wrap=True,
    )
    words = iter(texts)
    for number, row in enumerate(rows):
        trained = sum(len(ids) for ids, is_trained in row if is_trained)
        total = sum(len(ids) for ids, _ in row)
        out.print(f"  row {number}: {counted(total, 'token')}, {trained} trained", style="dim")
        out.print(Padding(_marked([(next(words), is_trained) for _, is_trained in row]), (0, 0, 0, 4)))
    for line in _shares(spec, found, device):
        out.print(f"  {line}", soft_wrap=True)


def _rows(spec: Spec, path: str) -> Iterator[list[tuple[list[int], bool]]]:
    """The first rows as training sees them. A row is a list of (consecutive ids, whether they are trained)."""
    from sftd.wire.data.dataset import first_rows

    for ids, predicted in first_rows(path, _ROWS, spec.data.sequence_length, spec.data.truncation):
        marked = zip(ids, predicted, strict=True)
        yield [([i for i, _ in run], key) for key, run in itertools.groupby(marked, key=lambda pair: pair[1])]


def _texts(folder: str, wanted: list[list[int]]) -> list[str]:
    """Each list of ids as text; as ids where the folder's tokenizer cannot be read."""
    import msgspec

    from sftd.launcher.tools import ToolFailed, run_tool

    try:
        done = run_tool("row_text", [folder], lambda line: None, msgspec.json.encode(wanted))
        return [output.printable(_shortened(text.replace("\n", "⏎"), _HEAD, _TAIL)) for text in done["texts"]]
    except ToolFailed as error:
        output.note(f"Token ids are shown instead of text: {str(error).splitlines()[-1]}")
    return [
        " ".join(map(str, ids[:_IDS])) + (f" … ({len(ids)} ids)" if len(ids) > _IDS else "") for ids in wanted
    ]


def _shortened(text: str, head: int, tail: int) -> str:
    return text if len(text) <= head + tail + 3 else f"{text[:head]} … {text[-tail:]}"


def _marked(parts: list[tuple[str, bool]]) -> Text:
    from rich.text import Text

    shown = Text(overflow="fold")
    for text, is_trained in parts:
        if is_trained:
            shown.append("«", "green")
            shown.append(text, "bold green underline")
            shown.append("»", "green")
        else:
            shown.append(text, "dim")
    return shown


def _shares(spec: Spec, found: Preflight, device: str) -> Iterator[str]:
    from sftd.domain.plan.batch import workload

    train = found.train
    trained = train.trained_tokens / max(train.seen_tokens, 1)
    work = workload(spec, train, found.planned_steps, device)
    padded = max(0.0, 1 - work.real / work.computed)
    yield (
        f"Of {train.seen_tokens:,} tokens {trained:.1%} are trained, {1 - trained:.1%} masked; padding is "
        f"{padded:.1%} of what is computed"
        + ("" if spec.training.use_rmpad else " (training.use_rmpad leaves it out)" if padded > 0.05 else "")
    )
    yield (
        f"Of {train.rows:,} rows {train.truncated:,} are truncated ({train.truncated / max(train.rows, 1):.1%}), "
        f"{train.unusable:,} dropped (no trained label)"
    )
    if train.stopping is not None:
        yield f"{train.stopping:,} of {train.usable:,} rows train the token that ends an answer"
