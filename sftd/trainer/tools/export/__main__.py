"""Command line of the export; reports as JSON lines on standard output.

    ORDER CHECKPOINT DIR [--digest SHA256] [--max-shard-bytes N] [--merge]

ORDER is the order.json of an attempt of the run, CHECKPOINT the folder of one of its checkpoints, SHA256 the digest of the
checkpoint's manifest, and DIR the folder to create. After success, the last line has the event `done`. Exit codes: 0; 2
with a message on standard error for an error that the user can fix, which leaves nothing in DIR; any other code is a
defect.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_USER_ERROR = 2
_INTERRUPTED = 130
_SHARD_BYTES = 5_000_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Export and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m sftd.trainer.tools.export", description="Write a checkpoint as a Hugging Face folder."
    )
    parser.add_argument("order", type=Path, help="order.json of an attempt of the run")
    parser.add_argument("checkpoint", type=Path, help="folder of the checkpoint")
    parser.add_argument("out", type=Path, metavar="dir", help="folder to create")
    parser.add_argument("--digest", help="sha256 of the checkpoint's manifest.json")
    parser.add_argument("--max-shard-bytes", type=int, default=_SHARD_BYTES, help="largest weight file")
    parser.add_argument("--merge", action="store_true", help="write the model with its adapters merged")
    arguments = parser.parse_args(argv)

    # The export runs on the CPU: a training may occupy the GPU's memory.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from sftd.trainer.runtime.megatron_edges.noise import quiet_third_parties

    quiet_third_parties()
    from sftd.domain.errors import CheckpointInvalid, Refused
    from sftd.trainer.errors import UserError
    from sftd.trainer.tools.export.export import export
    from sftd.trainer.tools.protocol import claim_stdout
    from sftd.wire.attempt.directory import read_order
    from sftd.wire.checkpoint.directory import reading

    events = claim_stdout()
    try:
        order = read_order(arguments.order)
        with reading(arguments.checkpoint):
            done = export(
                order.spec,
                arguments.checkpoint,
                arguments.out,
                arguments.digest,
                arguments.max_shard_bytes,
                events,
                order.template,
                merge=arguments.merge,
            )
        events.emit("done", **done)
    except (Refused, UserError, CheckpointInvalid, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return _USER_ERROR
    except KeyboardInterrupt:
        return _INTERRUPTED
    finally:
        events.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
