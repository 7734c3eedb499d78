"""A worker process of the local engine: reads an experiment, then answers task after task.

Started as `python -m tesserafl.run.worker`; frames on standard input and output.
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
from tesserafl.core.wire import decode_task, encode_update
from tesserafl.engines.client import ClientWorker
from tesserafl.engines.frames import read_frame, write_frame
from tesserafl.engines.local import FAULT
from tesserafl.engines.process import threads
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
    experiment = from_json(json.loads(hello.body))
    with threads(experiment.engine.threads):
        worker = client_worker(prepare(experiment))
        write_frame(output, b"ready")
        try:
            while (head := read_frame(sys.stdin.buffer)) is not None:
                _serve(worker, int(head.body), output)
        except Exception:
            write_frame(output, traceback.format_exc().encode(), failed=True)
            raise SystemExit(FAULT) from None


def _serve(worker: ClientWorker, number: int, output: IO[bytes]) -> None:
    """Read the tasks of one group, work on them, write as many answers."""
    asked = []
    for _ in range(number):
        frame = read_frame(sys.stdin.buffer)
        if frame is None:  # the main process is gone
            return
        asked.append(decode_task(frame.body))
    begun = time.perf_counter()
    answers = worker.work_together(asked)
    seconds = (time.perf_counter() - begun) / number
    for answer in answers:
        if isinstance(answer, TesseraError):
            write_frame(output, str(answer).encode(), seconds, failed=True)
        else:
            write_frame(output, encode_update(*answer), seconds)


if __name__ == "__main__":
    main()
