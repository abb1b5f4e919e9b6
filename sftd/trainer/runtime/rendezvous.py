"""Where the ranks of one host meet: on its loopback device, and nowhere else.

What torchrun and torch would open by themselves listens on every address of the host, without a password, and what is
written there is unpickled. So rank 0 opens the port itself, and says in the attempt's folder which it is.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from sftd.wire.attempt.directory import write_atomic

_LOOPBACK = "127.0.0.1"
_POLL_SECONDS = 0.02


def store(port_file: Path | None) -> Any:
    """The store of this world, when all of its ranks are on this host; None leaves it to torch (several hosts, or a torchrun
    that has opened one already). With several ranks, `port_file` is where rank 0 writes its port, and must be new."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    is_open = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(world)
    if is_open or not is_one_host or (world > 1 and port_file is None):
        return None
    if rank == 0:
        server = socket.create_server((_LOOPBACK, 0), backlog=128)
        port = server.getsockname()[1]
        found = _tcp_store(
            port, world, is_master=True, wait_for_workers=False, master_listen_fd=server.detach()
        )
        if port_file is not None:
            write_atomic(port_file, str(port).encode())
        return found
    assert port_file is not None
    # Should rank 0 never get there, torchrun ends this rank.
    while not port_file.exists():
        time.sleep(_POLL_SECONDS)
    return _tcp_store(int(port_file.read_text()), world, is_master=False)


def _tcp_store(port: int, world: int, **options: Any) -> Any:
    # As patient as torch's own: a rank may load a large model while the others wait for it.
    return dist.TCPStore(  # type: ignore[attr-defined]
        _LOOPBACK, port, world, timeout=default_pg_timeout, **options
    )
