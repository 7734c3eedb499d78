"""A worker process of the local engine: reads an experiment, then answers task after task.

Started as `python -m tesserafl.run.worker INDEX DOWN UP`: its number, and the descriptors of the
memory that it shares with the main process. Frames on standard input and output.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from typing import IO

from tesserafl.core.errors import TesseraError
from tesserafl.core.wire import task_of, update_parts
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.frames import read_frame, write_frame
from tesserafl.engines.process import threads
from tesserafl.engines.processes import FAULT
from tesserafl.engines.slab import Slab
from tesserafl.run.experiment import from_json
from tesserafl.run.setup import client_worker, prepare


def main() -> None:
    """Serve until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    # The frames own the output: a library that prints must not get between them.
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    hello = read_frame(sys.stdin.buffer)
    if hello is None:
        return
    index, down, up = map(int, sys.argv[1:])
    experiment = from_json(json.loads(hello.body))
    with threads(experiment.engine.threads):
        worker = client_worker(prepare(experiment), index)
        tasks, updates = Slab(down), Slab(up)
        write_frame(output, b"ready")
        try:
            while (frame := read_frame(sys.stdin.buffer)) is not None:
                _serve(worker, json.loads(frame.body), tasks, updates, output)
        except Exception:
            write_frame(output, traceback.format_exc().encode(), failed=True)
            raise SystemExit(FAULT) from None


def _serve(
    worker: ClientWorker, places: list[list[int]], down: Slab, up: Slab, output: IO[bytes]
) -> None:
    """Read the tasks of one group, work on them, write as many answers."""
    begun = time.perf_counter()
    up.start_over()
    answers = [
        str(answer) if isinstance(answer, TesseraError) else up.put(*update_parts(*answer))
        for answer in worker.work_together([task_of(*down.get(*place)) for place in places])
    ]
    write_frame(output, json.dumps(answers).encode(), time.perf_counter() - begun)


if __name__ == "__main__":
    main()
