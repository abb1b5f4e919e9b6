"""The chat template of data files: read from their metadata, kept with the run, compared between files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.data.chat_template import DEFAULT_DATE, ChatTemplate
from sftd.domain.spec.spec import Spec
from sftd.trainer.tools.export.template_files import write_template
from sftd.wire import preflight
from sftd.wire.data import chat_template
from tests.builders.log.specs import found


def file_with(path: Path, metadata: Any) -> str:
    written = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata({b"sftd": written}), path)
    return str(path)


GIVEN = {"text": "{{ messages }}", "date": "2025-01-02", "arguments": {"enable_thinking": False}}


def test_the_first_template_that_is_named_is_that_of_the_files(tmp_path: Path) -> None:
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.table({"x": [1]}), plain)
    older = file_with(tmp_path / "older.parquet", {"format": 1, "chat_template_sha256": "a"})
    given = file_with(tmp_path / "given.parquet", {"chat_template": GIVEN, "chat_template_sha256": "b"})
    assert chat_template.of_files([str(plain), older]) is None
    assert chat_template.of_files([str(plain), older, given]) == msgspec.convert(GIVEN, ChatTemplate)
    assert chat_template.different([str(plain), older, given, given]) is None


@pytest.mark.parametrize(
    "metadata",
    [
        b"\xff",
        b"[1]",
        {"chat_template": 5},
        {"chat_template": {"date": "soon"}},
        {"chat_template": {"text": 1}},
        b'{"x": ' + b"[" * 100_000,
    ],
)
def test_the_metadata_of_others_is_no_template(metadata: Any, tmp_path: Path) -> None:
    assert chat_template.of_files([file_with(tmp_path / "a.parquet", metadata)]) is None


@pytest.mark.parametrize(
    "other", [{"chat_template": {}, "chat_template_sha256": "b"}, {"chat_template": {"date": "2025-01-02"}}]
)
def test_files_that_were_rendered_in_different_ways_are_named(other: Any, tmp_path: Path) -> None:
    first = file_with(tmp_path / "a.parquet", {"chat_template": {}, "chat_template_sha256": "a"})
    second = file_with(tmp_path / "b.parquet", other)
    assert chat_template.different([first, second]) == (first, second)


def test_a_template_is_kept_in_the_first_event_and_only_where_there_is_one() -> None:
    assert "template" not in preflight.submission(Spec(), found(1), [], "ada").data
    templated = msgspec.structs.replace(found(1), template=ChatTemplate(name="short"))
    kept = preflight.submission(Spec(), templated, [], "ada").data["template"]
    assert kept == {"text": None, "name": "short", "date": DEFAULT_DATE, "arguments": {}}
    assert msgspec.convert(kept, ChatTemplate) == templated.template


def test_an_export_has_the_template_that_was_given_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ old }}", "eos_token": "é"}')
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for template in (None, ChatTemplate(name="tool_use")):
        write_template(tmp_path, template)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    write_template(tmp_path, ChatTemplate(text="{{ messages }}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "chat_template.jinja",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"eos_token": "é"}


def test_files_without_a_template_stand_between_none_that_are_compared(tmp_path: Path) -> None:
    def file(name: str, metadata: dict[bytes, bytes] | None) -> str:
        table = pa.table({"input_ids": [[1]]}).replace_schema_metadata(metadata)
        pq.write_table(table, tmp_path / name)
        return str(tmp_path / name)

    def written(text: str) -> dict[bytes, bytes]:
        return {b"sftd": json.dumps({"chat_template": {"text": text}}).encode()}

    none, first, same = file("none", None), file("first", written("a")), file("same", written("a"))
    other, last = file("other", written("b")), file("last", {b"sftd": b"no JSON"})
    assert chat_template.different([none, first, last, same]) is None
    assert chat_template.different([none, first, none, same, other]) == (first, other)
