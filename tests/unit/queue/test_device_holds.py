"""GPUs that `sftd verify` computes on are not given to a run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from sftd.domain.spec.parse import parse
from sftd.launcher.device_holds import held, holding
from sftd.launcher.inventory import Inventory


def test_what_is_held_is_not_free_until_it_is_let_go(tmp_path: Path) -> None:
    spec, _ = parse({"model": {"partial_pretrain": "m"}, "data": {"train_files": ["t"]}}, [])
    inventory = Inventory(2, 4, others=lambda: held(tmp_path))
    assert inventory.free("cuda") == ["cuda:0", "cuda:1"]
    with holding(tmp_path, ["cuda:0"]):
        assert (inventory.free("cuda"), inventory.fits(spec)) == (["cuda:1"], True)
        # Another one on the same GPU, because somebody named it.
        with holding(tmp_path, ["cuda:0", "cuda:1"]):
            assert inventory.fits(spec) is False
            # The run had been claimed when the GPUs went.
            assert inventory.take("run", spec)[1] == ["cuda:0"]
            inventory.release("run")
        assert inventory.take("run", spec)[1] == ["cuda:1"]
        assert len(inventory.free("cpu")) == 4
    assert inventory.free("cuda") == ["cuda:0"]


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        with holding(tmp_path, ["cuda:0"]):
            os.write(write, b"x")
            signal.pause()
    os.read(read, 1)
    assert held(tmp_path) == {"cuda:0"}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert held(tmp_path) == set()
    os.close(read)
    os.close(write)
