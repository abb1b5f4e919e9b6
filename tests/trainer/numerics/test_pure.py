"""The parts of the trainer that need no ranks: schedule, order of samples, rows, batches, manifest."""

from __future__ import annotations

import math
import os
import random
import re
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sftd.domain.errors import CheckpointInvalid
from sftd.domain.spec.learning_rate import learning_rate
from sftd.domain.spec.sections import Optimizer, Scheduler
from sftd.domain.spec.spec import Spec
from sftd.trainer.checkpoint import folder_swap
from sftd.trainer.data.rows import Rows, write_spool
from sftd.trainer.data.sample_order import SampleOrder, samples_digest
from sftd.trainer.errors import DataError, DataNotDecoded, UserError
from sftd.trainer.model.kernels import exact_attention
from sftd.trainer.optimizer.rectangles import rectangles
from sftd.trainer.runtime import process
from sftd.wire.checkpoint import directory as checkpoint_dir
from sftd.wire.checkpoint import manifest as manifests
from sftd.wire.checkpoint.manifest import FileEntry, Manifest

if TYPE_CHECKING:
    from collections.abc import Sequence


def test_ranks_of_an_earlier_job_in_the_environment_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        UserError,
        match=r"RANK, WORLD_SIZE set .* without LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
    ) as error:
        process.use_single_process_defaults()
    assert "fix: `unset RANK WORLD_SIZE`" in str(error.value)


def rates(kind: str, steps: int = 10, **scheduler: Any) -> list[float]:
    spec = Spec(optimizer=Optimizer(lr=2.0), scheduler=Scheduler(type=kind, **scheduler))  # type: ignore[arg-type]
    return [learning_rate(step, spec, steps) for step in range(steps)]


def test_warm_up_learns_from_the_first_step_and_ends_at_the_peak() -> None:
    assert rates("constant", 6, warmup_steps=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert rates("constant", 10, warmup_ratio=0.2)[:3] == [1.0, 2.0, 2.0]


def test_linear_and_cosine_fall_from_the_peak_towards_the_floor() -> None:
    assert rates("linear", 4, min_lr_ratio=0.5) == pytest.approx([2.0, 1.75, 1.5, 1.25])
    half = [2.0 * (1 + math.cos(math.pi * t / 4)) / 2 for t in range(4)]
    assert rates("cosine", 4) == pytest.approx(half)
    assert rates("cosine", 6, warmup_steps=2) == pytest.approx([1.0, 2.0, *half])
    assert min(rates("cosine", 100, min_lr_ratio=0.1)) > 0.2


def test_wsd_stays_at_the_peak_and_falls_at_the_end() -> None:
    assert rates("wsd", 10, warmup_steps=2, decay_ratio=0.4, min_lr_ratio=0.5) == pytest.approx(
        [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.75, 1.5, 1.25]
    )
    # A decay that would begin within the warm-up begins after it; none at all is a constant rate.
    assert rates("wsd", 4, warmup_steps=2, decay_ratio=1.0) == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert rates("wsd", 4, decay_ratio=0.0) == [2.0] * 4


def test_every_type_has_a_rule_of_its_own_and_an_unknown_one_has_none() -> None:
    types = get_args(get_type_hints(Scheduler)["type"])
    shapes = {kind: tuple(rates(kind, 20, warmup_steps=3)) for kind in types}
    assert len(set(shapes.values())) == len(types) >= 4
    with pytest.raises(AssertionError, match="sawtooth"):
        rates("sawtooth")


def test_a_warm_up_of_the_whole_run_is_no_division_by_zero() -> None:
    assert rates("cosine", 3, warmup_steps=3)[-1] == 2.0


def test_every_epoch_is_a_permutation_of_its_own_and_steps_straddle_its_end() -> None:
    order = SampleOrder(37, seed=5, shuffle=True)
    stream = np.concatenate([order.rows(8 * step, 8) for step in range(14)])
    epochs = [stream[37 * e : 37 * (e + 1)] for e in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [order.epoch(p) for p in (0, 36, 37, 74)] == [0, 0, 1, 2]
    # Any place can be asked for without what came before: that is all a resume needs.
    assert np.array_equal(SampleOrder(37, seed=5, shuffle=True).rows(80, 8), stream[80:88])
    assert not np.array_equal(SampleOrder(37, seed=6, shuffle=True).rows(0, 37), epochs[0])


def test_the_order_is_a_contract() -> None:
    assert SampleOrder(8, seed=1234, shuffle=True).rows(0, 8).tolist() == [7, 3, 0, 1, 4, 2, 5, 6]
    assert SampleOrder(3, seed=1, shuffle=False).rows(2, 5).tolist() == [2, 0, 1, 2, 0]
    assert (
        samples_digest(np.array([1, 2])) == "0c730b69905c5ef7a4ca5269f72365400bde2dd2c04eaf9bbb3d1c4a265a0131"
    )


def write(path: Path, rows: Sequence[tuple[list[int], list[int], list[int]]]) -> str:
    columns = dict(
        zip(("input_ids", "attention_mask", "labels"), map(list, zip(*rows, strict=True)), strict=True)
    )
    pq.write_table(pa.table(columns), path, row_group_size=2)
    return str(path)


def row(tokens: list[int], trained: int, padding: int = 0) -> tuple[list[int], list[int], list[int]]:
    """Tokens of which the last `trained` are trained, with padding on the right."""
    untrained = len(tokens) - trained
    return (
        tokens + [0] * padding,
        [1] * len(tokens) + [0] * padding,
        [-100] * untrained + tokens[untrained:] + [-100] * padding,
    )


def rows_of(paths: list[str], **options: Any) -> Rows:
    with tempfile.TemporaryDirectory() as spool:
        settings = {"sequence_length": 4, "truncation": "right", "vocab_size": 100} | options
        write_spool(Path(spool), paths, **settings)
        return Rows(Path(spool))


def test_rows_are_shifted_truncated_counted_and_numbered(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [row([5, 6, 7], 2), row([1, 2, 3, 4, 5, 6], 1), row([8, 9], 2, padding=1)])
    second = write(tmp_path / "b", [row([1, 2], 0), row([1, 2, 3, 4, 5, 6], 3)])
    rows = rows_of([first, second])
    assert (len(rows), rows.truncated_rows, rows.dropped_rows) == (3, 2, 2)
    assert rows.numbers.tolist() == [0, 2, 4]
    assert rows.lengths.tolist() == [3, 2, 4]
    # labels[i] is what token i is to predict; the first token's own label is nobody's to predict.
    assert [(s.tokens.tolist(), s.labels.tolist()) for s in map(rows.__getitem__, range(3))] == [
        ([5, 6, 7], [6, 7, -100]),
        ([8, 9], [9, -100]),
        ([1, 2, 3, 4], [-100, -100, 4, -100]),
    ]
    left = rows_of([first, second], truncation="left")
    assert left.numbers.tolist() == [0, 1, 2, 4]
    assert (left[3].tokens.tolist(), left[3].labels.tolist()) == ([3, 4, 5, 6], [4, 5, 6, -100])


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        (
            [row([1, 2, 3, 4, 5], 1)],
            {"truncation": "error"},
            "row 0 has 5 tokens, more than data.sequence_length 4",
        ),
        ([row([1, 200], 1)], {}, "outside the model's vocabulary"),
        ([([1, 2, 3], [1, 0, 1], [1, 2, 3])], {}, "attention_mask has a 0 before a 1"),
        ([([1, 2], [1, 1], [1])], {}, "row 0 has 2 input_ids but 1 labels"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused(
    tmp_path: Path, rows: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        rows_of([write(tmp_path / "bad", rows)], **options)


def test_a_run_continues_with_the_labels_that_it_began_with(tmp_path: Path) -> None:
    """Submit refuses labels of other tokens; a run of a version that did not can be resumed and verified."""
    rows = rows_of([write(tmp_path / "a", [([1, 2, 3, 4], [1] * 4, [2, 3, 4, -100])])])
    assert rows[0].labels.tolist() == [3, 4, -100, -100]


def test_no_file_and_no_usable_row_are_no_rows(tmp_path: Path) -> None:
    assert len(rows_of([])) == 0
    rows = rows_of([write(tmp_path / "a", [row([1, 2], 0), row([3, 4, 5], 0)])])
    assert (len(rows), rows.dropped_rows) == (0, 2)


def test_a_disk_that_the_decoded_rows_do_not_fit_on_is_told(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the full disk."""
    path = write(tmp_path / "a", [row(list(range(1, 51)), 4)] * 20)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(DataNotDecoded, match=r"cannot be written to .*File too large"):
            rows_of([path], sequence_length=64)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text("{}")
    with pytest.raises(DataError, match="is not a Parquet file"):
        rows_of([str(tmp_path / "bad")])


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Manifest]:
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    for name in ("a.distcp", ".metadata"):
        (folder / name).write_bytes(name.encode() * 1000)
    manifest = Manifest(
        schema_version=1,
        run_id="run",
        spec_digest="s",
        step=3,
        tokens_total=5,
        samples=24,
        loss=float("nan").hex(),
        grad_norm=(1.5).hex(),
        layout={"tp": 1},
        dtype="float32",
        versions={"torch": "2"},
        files=manifests.describe(folder, manifests.list_files(folder)),
    )
    (folder / manifests.NAME).write_bytes(manifests.encode(manifest))
    return folder, manifest


def test_a_whole_checkpoint_verifies(checkpoint: tuple[Path, Manifest]) -> None:
    folder, manifest = checkpoint
    digest = manifests.digest((folder / manifests.NAME).read_bytes())
    assert manifests.read(folder, digest) == manifest
    assert manifests.find_damage(folder, manifest) is None


def test_every_damage_is_found(checkpoint: tuple[Path, Manifest]) -> None:
    folder, manifest = checkpoint
    data = bytearray((folder / "a.distcp").read_bytes())
    data[500] ^= 1
    (folder / "a.distcp").write_bytes(data)
    assert "a.distcp has sha256" in (manifests.find_damage(folder, manifest) or "")
    (folder / "a.distcp").write_bytes(data[:-1])
    assert manifests.find_damage(folder, manifest) == "a.distcp has 7999 bytes, not 8000"
    (folder / "a.distcp").unlink()
    assert manifests.find_damage(folder, manifest) == "a.distcp is missing"


def test_a_manifest_cannot_point_out_of_its_folder(checkpoint: tuple[Path, Manifest]) -> None:
    folder, manifest = checkpoint
    (folder.parent / "x").write_text("x")
    entry = FileEntry(name="../x", bytes=1, sha256="")
    out = msgspec.structs.replace(manifest, files=[*manifest.files, entry])
    assert manifests.find_damage(folder, out) == "manifest.json lists a file twice, or one outside the folder"


@pytest.mark.parametrize(
    ("name", "add", "reason"),
    [
        ("common.pt", lambda p: p.write_bytes(b"x"), "common.pt is not in manifest.json"),
        (
            "a.distcp",
            lambda p: (p.rename(p.parent.parent / "a"), p.symlink_to("../a")),
            "a.distcp is not a regular file",
        ),
        ("extra", Path.mkdir, "extra is not a regular file"),
        ("pipe", os.mkfifo, "pipe is not a regular file"),
    ],
)
def test_what_the_manifest_does_not_list_is_damage(
    checkpoint: tuple[Path, Manifest], name: str, add: Callable[[Path], object], reason: str
) -> None:
    folder, _ = checkpoint
    add(folder / name)
    with pytest.raises(CheckpointInvalid, match=re.escape(reason)):
        manifests.verify(folder, None)


def test_a_manifest_that_is_a_link_or_a_pipe_is_not_read(checkpoint: tuple[Path, Manifest]) -> None:
    folder, _ = checkpoint
    path = folder / manifests.NAME
    path.rename(folder.parent / "elsewhere")
    path.symlink_to("../elsewhere")
    with pytest.raises(CheckpointInvalid, match="cannot be read"):
        manifests.read(folder, None)
    path.unlink()
    # Opened as usual, it would keep its reader waiting for ever.
    os.mkfifo(path)
    with pytest.raises(CheckpointInvalid, match="not a regular file"):
        manifests.read(folder, None)
    with checkpoint_dir.reading(folder):
        assert not checkpoint_dir.is_checkpoint_of(str(folder), "run")


def test_a_manifest_that_is_torn_missing_new_or_another_is_refused(checkpoint: tuple[Path, Manifest]) -> None:
    folder, manifest = checkpoint
    path = folder / manifests.NAME
    with pytest.raises(CheckpointInvalid, match="not the one that was published"):
        manifests.read(folder, "0" * 64)
    path.write_bytes(manifests.encode(msgspec.structs.replace(manifest, schema_version=3)))
    with pytest.raises(CheckpointInvalid, match="a newer sftd wrote it"):
        manifests.read(folder, None)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointInvalid, match="cannot be read"):
        manifests.read(folder, None)
    path.write_bytes(b'{"x": ' + b"[" * 100_000)
    with pytest.raises(CheckpointInvalid, match="not a manifest"):
        manifests.read(folder, "0" * 64)
    path.unlink()
    with pytest.raises(CheckpointInvalid, match="cannot be read"):
        manifests.read(folder, None)


def test_a_folder_is_put_in_place_of_an_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for can_exchange in (True, False):
        if not can_exchange:
            monkeypatch.setattr(folder_swap, "_exchange", lambda *_: False)
        for content in ("first", "second"):
            new = tmp_path / "new"
            new.mkdir()
            (new / "file").write_text(content)
            folder_swap.publish_folder(new, tmp_path / "published")
            assert (tmp_path / "published/file").read_text() == content
            assert [p.name for p in tmp_path.iterdir()] == ["published"]


def test_a_folder_that_cannot_take_the_place_of_another_leaves_it_there(tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    (published / "file").write_text("old")
    with pytest.raises(FileNotFoundError) as refused:
        folder_swap.publish_folder(tmp_path / "nowhere", published)
    assert refused.value.filename == str(published)
    assert refused.value.strerror == os.strerror(refused.value.errno or 0)
    assert (published / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [published]


def test_a_range_of_elements_is_cut_into_rectangles_in_order() -> None:
    numbers = random.Random(1)
    for _ in range(500):
        shape = tuple(numbers.randint(1, 5) for _ in range(numbers.randint(0, 4)))
        whole = np.arange(math.prod(shape)).reshape(shape)
        start = numbers.randint(0, whole.size)
        end = numbers.randint(start, whole.size)
        found = [
            whole[tuple(slice(o, o + s) for o, s in zip(offset, sides, strict=True))].ravel()
            for offset, sides in rectangles(shape, start, end)
        ]
        assert np.concatenate([*found, []]).tolist() == list(range(start, end))


@pytest.mark.parametrize(
    ("batch", "groups", "most", "expected"),
    [
        # (rows, groups) of each part, where a group of a row has 10.
        (8, 4, 1000, [(8, 4)]),
        (8, 4, 100, [(2, 4)] * 4),
        (5, 4, 100, [(2, 4), (2, 4), (1, 4)]),
        (1, 4, 39, [(1, 2), (1, 2)]),
        (2, 3, 10, [(1, 1)] * 6),
        (2, 3, 9, None),
    ],
)
def test_deterministic_attention_goes_in_parts(
    batch: int, groups: int, most: int, expected: list[tuple[int, int]] | None
) -> None:
    found = exact_attention.parts(batch, groups, 10, most)
    if found is None or expected is None:
        assert found is expected
        return
    assert [(r.stop - r.start, g.stop - g.start) for r, g in found] == expected
    covered = [(r, g) for rows, some in found for r in range(batch)[rows] for g in range(groups)[some]]
    assert sorted(covered) == [(r, g) for r in range(batch) for g in range(groups)]
