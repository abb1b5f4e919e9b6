"""Numbers as people read them."""

from __future__ import annotations

from sftd.cli.plan.view import seconds
from sftd.cli.terminal import output
from sftd.domain.errors import several
from sftd.domain.text.words import counted, memory, size
from sftd.trainer.tools.prepare.card import reason_of
from tests.builders.log.histories import step


def test_one_has_no_s() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 28_440)] == ["0 rows", "1 row", "2 rows", "28,440 rows"]
    assert counted(2, "anomaly", "anomalies") == "2 anomalies"


def test_memory_is_in_gib_and_disk_in_gb() -> None:
    assert [output.memory(n) for n in (512 * 2**20, 80 * 2**30)] == ["512 MiB", "80.0 GiB"]
    assert output.size(4_000_000_000) == "4.0 GB"


def test_the_same_mistake_in_another_message_is_the_same_reason() -> None:
    assert reason_of("message 12: write one JSON object a line, in UTF-8") == reason_of(
        "message 3: write one JSON object a line, in UTF-8"
    )
    assert reason_of("row 5 is not UTF-8, sha256 abc1") == "row N is not UTF-8, sha256 abc1"


def test_a_step_fits_80_columns() -> None:
    done = step(1000, loss=10.1234, grad_norm=1.0384, lr=7.94e-4, seconds=20 / 8_765, mfu=None)
    assert len(f"[attempt 1] {done.line(2000)}") <= 80


def test_a_short_step_is_not_zero() -> None:
    shown = [seconds(value) for value in (0.0026, 0.0999, 0.42, 12.3)]
    assert shown == ["2.6 ms", "100 ms", "0.42 s", "12 s"]


def test_units_change_at_their_edges() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_949, 1_000_000, 10**9, 10**12, 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "999.9 kB",
        "1.0 MB",
        "1.0 GB",
        "1.0 TB",
        "1000.0 TB",
    ]
    assert [memory(n * 2**20) for n in (0, 972, 973, 1024, 1536)] == [
        "0 MiB",
        "972 MiB",
        "1.0 GiB",
        "1.0 GiB",
        "1.5 GiB",
    ]


def test_of_several_texts_three_are_said_and_the_rest_counted() -> None:
    assert [several("abcde"[:n]) for n in (1, 3, 4, 5)] == [
        "a",
        "a, b, c",
        "a, b, c and 1 more",
        "a, b, c and 2 more",
    ]
