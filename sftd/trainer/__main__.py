"""`python -m sftd.trainer ATTEMPT_DIR`: one rank of an attempt, started by torchrun.

Kept this small, and guarded, because Python's spawned helper processes import the main module again.
"""

import sys

if __name__ == "__main__":
    from torch.distributed.elastic.multiprocessing.errors import record

    from sftd.trainer.process import prepare

    prepare()

    from sftd.trainer.loop import run

    record(run)(sys.argv[1])
