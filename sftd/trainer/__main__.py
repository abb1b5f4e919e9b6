"""`python -m sftd.trainer ATTEMPT_DIR`: one rank of an attempt that a daemon ordered, started by torchrun.
`python -m sftd.trainer [CONFIG] [KEY=VALUE]...`: one rank of a run without a daemon.

Small and guarded, because Python's spawned helper processes import the main module again.
"""

import os
import signal
import sys
from types import FrameType


def _leave(_number: int, _frame: FrameType | None) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"Stopped before the first step; nothing was written.\n")
    os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    # The imports take seconds. `direct` installs its own handlers afterwards.
    signal.signal(signal.SIGINT, _leave)

    from torch.distributed.elastic.multiprocessing.errors import record

    from sftd.trainer.runtime.process import prepare
    from sftd.wire.attempt.directory import AttemptDir

    prepare()

    if len(sys.argv) == 2 and os.path.isfile(AttemptDir(sys.argv[1]).order_file):
        from sftd.trainer.loop.attempt import run
        from sftd.trainer.runtime.output_cap import cap_output

        signal.signal(signal.SIGINT, signal.default_int_handler)
        cap_output(AttemptDir(sys.argv[1]).ranks_dir)
        record(run)(sys.argv[1])
    else:
        from sftd.trainer.direct.direct import main

        record(main)(sys.argv[1:])
