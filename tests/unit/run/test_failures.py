"""Why an attempt ended, from what torchrun and the ranks really print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sftd.domain.log import codec
from sftd.domain.log import events as e
from sftd.domain.run.failures import RankError, Remains, classify
from sftd.domain.spec.spec import Spec
from sftd.wire.attempt.directory import AttemptDir, Order, make_private
from sftd.wire.attempt.remains import find_remains

TORCHRUN_SUMMARY = """\
E1021 09:12:33.118000 4711 torch/distributed/elastic/multiprocessing/api.py:874] failed (exitcode: {exitcode}) local_rank: 0 (pid: 4720) of binary: /venv/bin/python
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "/venv/lib/python3.12/site-packages/torch/distributed/run.py", line 905, in main
    run(args)
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
sftd.trainer FAILED
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-10-21_09:12:33
  host      : node1
  rank      : 0 (local_rank: 0)
  exitcode  : {exitcode} (pid: 4720)
  error_file: {error_file}
  traceback : {traceback}
============================================================
"""


def output(
    printed: str = "", *, exitcode: int = 1, traceback: str = "To enable traceback see: https://pytorch.org"
) -> list[str]:
    summary = TORCHRUN_SUMMARY.format(exitcode=exitcode, error_file="<N/A>", traceback=traceback)
    return (printed + "\n" + summary).splitlines()


OOM = (
    "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of "
    "79.10 GiB of which 1.02 GiB is free."
)
NCCL = (
    "[rank1]:[E1021 09:12:30.1] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, "
    "OpType=ALLREDUCE, Timeout(ms)=600000) ran for 600015 milliseconds before timing out."
)
GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4242"


@pytest.mark.parametrize(
    ("remains", "cause", "says"),
    [
        (Remains(1, output_tail=output(OOM)), "out of memory", "CUDA out of memory"),
        (
            Remains(
                1,
                output_tail=output("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory"),
            ),
            "out of memory",
            "DefaultCPUAllocator",
        ),
        (
            Remains(
                1, output_tail=output("OSError: [Errno 28] No space left on device: '/ck/step-5.partial'")
            ),
            "disk full",
            "No space left",
        ),
        (
            Remains(1, output_tail=output("OSError: [Errno 122] Disk quota exceeded: '/ck/step-5.partial'")),
            "disk full",
            "Disk quota exceeded",
        ),
        (
            Remains(1, rank_errors=[RankError(0, "OSError: [Errno 27] File too large")]),
            "disk full",
            "File too large",
        ),
        (
            Remains(
                1, rank_errors=[RankError(0, "sftd.trainer.errors.NonFiniteLoss: the loss of step 7 is nan")]
            ),
            "not a number",
            "step 7",
        ),
        (Remains(1, output_tail=output("sftd.trainer.errors.UserError: no GPU")), "user error", "no GPU"),
        (
            Remains(
                1, rank_errors=[RankError(2, "sftd.trainer.errors.CheckpointInvalid: step-5: digest differs")]
            ),
            "bad checkpoint",
            "rank 2:",
        ),
        (
            Remains(1, rank_errors=[RankError(0, "Refused: data.train_files: is empty")]),
            "user error",
            "is empty",
        ),
        (
            Remains(1, output_tail=output("sftd.domain.errors.Refused: data.train_files: is empty")),
            "user error",
            "is empty",
        ),
        (
            Remains(1, rank_errors=[RankError(0, "ConnectionError: Connection Refused by node2")]),
            "crash",
            "node2",
        ),
        (Remains(1, output_tail=output("RuntimeError: CUDA error: out of memory")), "out of memory", "CUDA"),
        (
            Remains(1, output_tail=output("NCCL error: unhandled cuda error 'out of memory'")),
            "out of memory",
            "NCCL",
        ),
        (
            Remains(1, rank_errors=[RankError(0, "OSError: [Errno 12] Cannot allocate memory")]),
            "out of memory",
            "Errno 12",
        ),
        (Remains(1, output_tail=output(NCCL)), "communication", "Watchdog"),
        (Remains(1, output_tail=output(GLOO)), "communication", "Connection closed"),
        (
            Remains(1, output_tail=output(exitcode=-9, traceback="Signal 9 (SIGKILL) received by PID 4720")),
            "killed",
            "SIGKILL",
        ),
        (
            Remains(
                1, output_tail=output(exitcode=-11, traceback="Signal 11 (SIGSEGV) received by PID 4720")
            ),
            "killed",
            "SIGSEGV",
        ),
        (Remains(137), "killed", "signal 9"),
        (Remains(-15), "killed", "signal 15"),
        (Remains(None, output_tail=["[sftd] step 5 …"]), "killed", "left no exit code"),
        (
            Remains(1, rank_errors=[RankError(1, "ValueError: boom"), RankError(0, "ValueError: bang")]),
            "crash",
            "rank 1: ValueError: boom",
        ),
        (Remains(1, output_tail=["Traceback …", "  raise", "KeyError: 'x'"]), "crash", "KeyError: 'x'"),
        # A rank that dies before it can leave an error file: its own words, not torchrun's summary of them.
        (Remains(1, output_tail=output("ImportError: no libcuda")), "crash", "ImportError: no libcuda"),
        (Remains(3), "crash", "exit code 3"),
    ],
)
def test_the_cause_is_named(remains: Remains, cause: str, says: str) -> None:
    failure = classify(remains)
    assert failure.cause == cause
    assert says in failure.message
    assert "\n" not in failure.message


@pytest.mark.parametrize("peer", [NCCL, GLOO])
def test_the_rank_that_broke_the_connection_is_blamed_not_its_peers(peer: str) -> None:
    assert classify(Remains(1, output_tail=output(f"{peer}\n{OOM}"))).cause == "out of memory"
    killed = output(peer, exitcode=-9, traceback="Signal 9 (SIGKILL) received by PID 4720")
    assert classify(Remains(1, output_tail=killed)).cause == "killed"


def test_a_ranks_own_exception_is_blamed_for_its_peers_abort_and_broken_connection() -> None:
    errors = [RankError(1, GLOO), RankError(0, "ValueError: boom")]
    aborted = output(NCCL, exitcode=-6, traceback="Signal 6 (SIGABRT) received by PID 4720")
    failure = classify(Remains(1, rank_errors=errors, output_tail=aborted))
    assert (failure.cause, failure.message) == ("crash", "rank 0: ValueError: boom")


def test_torchs_warning_of_a_process_group_left_open_is_not_a_communication_error() -> None:
    warning = (
        "[rank0]:[W1021 09:12:33.4 ProcessGroupNCCL.cpp:1524] Warning: WARNING: destroy_process_group() was not "
        "called before program exit"
    )
    failure = classify(Remains(1, output_tail=["[rank0]: ValueError: boom", warning]))
    assert (failure.cause, failure.message) == ("crash", "[rank0]: ValueError: boom")


def test_a_torchrun_that_was_told_to_end_was_killed() -> None:
    text = "torch.distributed.elastic.multiprocessing.api.SignalException: Process 4711 got signal: 15"
    assert classify(Remains(1, output_tail=[text])).cause == "killed"


def test_the_evidence_is_short_and_proves_the_cause() -> None:
    failure = classify(Remains(1, output_tail=output("\n".join(f"{OOM} {'x' * 2000}" for _ in range(20)))))
    assert len(failure.evidence) == 5
    assert all("CUDA out of memory" in line and len(line) <= 500 for line in failure.evidence)
    assert len(failure.message) <= 300


def test_an_attempt_that_left_nothing_still_has_a_cause() -> None:
    assert classify(Remains(None)).cause == "killed"


def left(path: Path, error: str) -> Remains:
    """What is found of an attempt whose rank 0 left this error file."""
    directory = AttemptDir(path)
    folder = directory.ranks_dir / "rendezvous" / "attempt_0" / "0"
    make_private(folder)
    (folder / "error.json").write_text(error)
    return find_remains(directory)


def test_a_file_name_that_is_not_utf8_does_not_keep_the_end_from_the_log(tmp_path: Path) -> None:
    said = f"FileNotFoundError: {b'/data/caf\xe9'.decode(errors='surrogateescape')}"
    remains = left(tmp_path, json.dumps({"message": {"message": said, "extraInfo": {"py_callstack": said}}}))
    failure = classify(remains)
    assert "caf" in failure.message
    event = e.AttemptFailed(
        cause=failure.cause, message=failure.message, exit_code=1, evidence=failure.evidence
    )
    _, version, payload = codec.encode(event)
    assert codec.decode("AttemptFailed", version, payload) == event


@pytest.mark.parametrize(
    "error",
    [
        '{"message": {"message": "m", "extraInfo": "no object"}}',
        '{"message": {"message": "m", "extraInfo": {"timestamp": Infinity}}}',
        "[" * 100_000,
        "[]",
        "torn",
    ],
)
def test_an_error_file_that_is_none_does_not_end_the_daemon(tmp_path: Path, error: str) -> None:
    assert classify(left(tmp_path, error)).cause == "killed"


def test_a_secret_that_a_rank_dies_with_does_not_reach_the_log(tmp_path: Path) -> None:
    """What it prints is in its output alone."""
    said = "OSError: 401 for https://ada:hush-9@host/x with hf_SECRETSECRET"
    (tmp_path / "output.log").write_text(f"{said}\n")
    error = json.dumps({"message": {"message": said, "extraInfo": {"py_callstack": said}}})
    folder = AttemptDir(tmp_path).ranks_dir / "rendezvous" / "attempt_0" / "0"
    make_private(folder)
    (folder / "error.json").write_text(error)
    remains = find_remains(AttemptDir(tmp_path), {"HF_TOKEN": "hf_SECRETSECRET", "API_KEY": "for"})
    clean = "OSError: 401 for https://ada:***@host/x with ***"
    assert remains.output_tail == [clean]
    assert remains.rank_errors == [RankError(0, clean, [clean])]


def test_the_secrets_are_those_of_the_ranks_and_not_of_who_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that adopts an attempt, or a person who imports one, has another environment."""
    secret = "hf_ABCDEFtoken123"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setenv("OTHER_KEY", f"{secret}-and-more")
    monkeypatch.setenv("ODD_SECRET", "\udcff-bytes-that-are-not-text")
    directory = AttemptDir(tmp_path / "attempt")
    directory.create(
        Order(run_id="r", attempt=1, token="t", spec=Spec(), planned_steps=1, checkpoint_dir="c")
    )
    assert secret.encode() not in directory.secrets_file.read_bytes()
    for name in ("HF_TOKEN", "OTHER_KEY", "ODD_SECRET"):
        monkeypatch.delenv(name)
    said = (
        f"RuntimeError: 401 for https://hub/x?auth={secret} and {secret}-and-more, {secret[:-1]}, h{secret}h"
    )
    directory.output_log.write_text(said)
    directory.write_rank_error(
        0, json.dumps({"message": {"message": said, "extraInfo": {"py_callstack": said}}})
    )
    hidden = f"RuntimeError: 401 for https://hub/x?auth=*** and ***, {secret[:-1]}, h***h"
    remains = find_remains(directory)
    assert remains.output_tail == [hidden]
    assert [(e.exception, e.traceback) for e in remains.rank_errors] == [(hidden, [hidden])]


@pytest.mark.parametrize(
    "left",
    [
        b"",
        b"[]",
        b'{"salt":"","secrets":[{"first":"","length":0,"digest":""}]}',
        b'{"salt":1}',
        b"\xff",
        None,
    ],
)
def test_whatever_stands_in_the_place_of_the_secrets_the_attempt_ends(
    tmp_path: Path, left: bytes | None
) -> None:
    """An older sftd wrote none; a stranger may write anything."""
    directory = AttemptDir(tmp_path)
    if left is not None:
        directory.secrets_file.write_bytes(left)
    directory.output_log.write_text("ValueError: hf_SECRETSECRET")
    found = find_remains(directory, {"HF_TOKEN": "hf_SECRETSECRET"}).output_tail
    # A list that can be read is taken at its word.
    assert found == ["ValueError: hf_SECRETSECRET" if left and b"length" in left else "ValueError: ***"]


def test_what_a_rank_said_can_do_nothing_to_a_terminal() -> None:
    said = "ValueError: a\x1b]0;title\x07 b\x9b2J c\u202ed\u2028e\x7f"
    assert classify(Remains(1, [RankError(0, said)])).message == "rank 0: ValueError: a ]0;title b 2J c d e"


# One text for each alternative by which a cause is known.
SIGNS = {
    "user error": ["UserError: no", "sftd.x.DataError: no", "Refused: no", "sftd.domain.errors.Refused: no"],
    "bad checkpoint": ["CheckpointInvalid: short"],
    "not a number": ["NonFiniteLoss: step 3"],
    "loss spike": ["LossSpike: step 3"],
    "out of memory": [
        "torch.OutOfMemoryError: no",
        "CUDA out of memory",
        "RuntimeError: CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "RuntimeError: DefaultCPUAllocator: can't allocate memory",
        "MemoryError",
        "numpy._core._exceptions._ArrayMemoryError: Unable to allocate",
        "OSError: [Errno 12] Cannot allocate memory",
    ],
    "disk full": [
        "OSError: [Errno 28] No space left on device",
        "OSError: [Errno 122] Disk quota exceeded",
        "OSError: [Errno 27] File too large",
    ],
    "communication": [
        "ncclUnhandledCudaError: NCCL",
        "torch.distributed.DistBackendError: x",
        "[../third_party/gloo/transport] x",
        "Gloo connectFullMesh failed",
        "Connection reset by peer",
        "Connection closed by peer",
        "Connection refused",
        "BrokenPipeError: Broken pipe",
        "Timed out waiting",
    ],
    "crash": ["ValueError: odd", "ConnectionError: odd", "MyMemoryErrors", "Refusedly: no"],
}


@pytest.mark.parametrize(
    ("cause", "text"), [(cause, text) for cause, texts in SIGNS.items() for text in texts]
)
def test_each_sign_of_a_cause(cause: str, text: str) -> None:
    assert classify(Remains(1, output_tail=["before", text, "behind"])).cause == cause
