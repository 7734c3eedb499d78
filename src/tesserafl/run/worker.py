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

from tesserafl.core.errors import TesseraError
from tesserafl.core.wire import decode_task, encode_update
from tesserafl.engines.client import threads
from tesserafl.engines.frames import read_frame, write_frame
from tesserafl.engines.local import FAULT
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
        while (frame := read_frame(sys.stdin.buffer)) is not None:
            begun = time.perf_counter()
            try:
                body = encode_update(*worker.work(*decode_task(frame.body)))
                failed = False
            except TesseraError as error:
                body, failed = str(error).encode(), True
            except Exception:
                write_frame(output, traceback.format_exc().encode(), failed=True)
                raise SystemExit(FAULT) from None
            write_frame(output, body, time.perf_counter() - begun, failed)


if __name__ == "__main__":
    main()
