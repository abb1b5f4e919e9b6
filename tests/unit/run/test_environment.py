"""Which parts of an environment decide numbers: the same answer for a resume, `sftd verify` and `sftd compare`."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from sftd.domain.compare.differences import differences
from sftd.domain.log import events as e
from sftd.domain.log.timeline import logged_steps
from sftd.domain.repro.environment import environment_differences, gives_same_numbers
from sftd.domain.repro.verifier import Comparing
from tests.builders.log.run_log import Log, step

# Every part that a trainer records, with another value of it, and whether that decides numbers.
PARTS: list[tuple[str, Any, Any, bool]] = [
    ("python", "3.12.1", "3.13.0", False),
    ("torch", "2.15.0", "2.16.0", True),
    ("megatron_core", "0.19.2", "0.20.0", True),
    ("transformers", "5.17.0", "5.18.0", False),
    ("sftd", "1.0", "1.1", True),
    ("device", "H100", "H200", True),
    ("cuda", "13.2", "13.3", True),
    ("driver", "580", "590", True),
    ("cudnn", 91900, 92000, True),
    ("nccl", "2.28", "2.29", True),
    ("triton", "3.6", "3.7", True),
    ("cudnn_frontend", "1.22", None, True),
    ("cpu_capability", "AVX2", "AVX512", True),
    ("cpu_model", "EPYC 9554", "Xeon 8480", True),
    ("threads", 1, 2, True),
    ("OMP_NUM_THREADS", "1", None, False),
    ("layout", {"tp": 1}, {"tp": 2}, True),
    ("dtype", "bfloat16", "float32", True),
    ("deterministic", True, False, True),
    ("matmul_precision", "highest", "high", True),
    ("variables", {}, {"NCCL_ALGO": "Ring"}, True),
]
ENVIRONMENT = {name: value for name, value, _, _ in PARTS}


def loaded(**changes: Any) -> e.ModelLoaded:
    environment = ENVIRONMENT | changes
    return e.ModelLoaded(
        architecture="a", parameters=1, dtype="f", device="d", seconds=1.0, environment=environment
    )


def test_differences_name_the_part() -> None:
    now = ENVIRONMENT | {"layout": {"tp": 2}, "variables": {"NCCL_ALGO": "Ring"}, "added": 1}
    assert environment_differences(ENVIRONMENT, now) == {
        "layout.tp": [1, 2],
        "variables.NCCL_ALGO": [None, "Ring"],
    }


@pytest.mark.parametrize(("name", "was", "now", "decides"), PARTS)
def test_resume_verify_and_compare_agree_on_each_part(name: str, was: Any, now: Any, decides: bool) -> None:
    assert gives_same_numbers({name: was}, {name: now}) is not decides
    changed = {name: now}

    resumed = Log().claim().add(loaded()).train(5, save_every=2)
    resumed.end().claim().add(loaded(**changed))
    # `deterministic: false` is said twice by a real trainer; here it is only a part of the environment.
    assert resumed.run.is_exact is not decides

    verified = Comparing(logged_steps(Log().claim().add(loaded()).train(1).recorded), loaded(**changed), {})
    verified.add(step(1))
    assert verified.may_round is decides

    ours = Log().claim().add(loaded()).run
    theirs = msgspec.structs.replace(ours, run_id="other", environment=ENVIRONMENT | changed)
    found = differences([ours, theirs], [None, None])
    told_by_the_spec = name in ("layout", "dtype", "deterministic")
    assert [d.keeps_steps for d in found] == ([] if told_by_the_spec else [not decides])
