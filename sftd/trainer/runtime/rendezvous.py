"""Rendezvous of the ranks of one host on its loopback device only.

The stores that torchrun and torch open listen on every address of the host, without a password, and unpickle the data that
they receive. So rank 0 opens the port itself and writes its number to the attempt's folder.
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
    """The store of this world if all ranks are on this host. None leaves it to torch: several hosts, or torchrun has
    already opened one. With several ranks, rank 0 writes its port to `port_file`, which must not exist yet."""
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
    # If rank 0 fails, torchrun ends this rank.
    while not port_file.exists():
        time.sleep(_POLL_SECONDS)
    return _tcp_store(int(port_file.read_text()), world, is_master=False)


def _tcp_store(port: int, world: int, **options: Any) -> Any:
    # torch's default timeout: a rank may load a large model while the others wait for it.
    return dist.TCPStore(  # type: ignore[attr-defined]
        _LOOPBACK, port, world, timeout=default_pg_timeout, **options
    )
