"""Runs another package's Python program and collects its garbage every few seconds.

    python -m tesserafl.run.sparing PROGRAM ARGUMENT...

Flower's node leaves the bytes of messages that it has passed on in cycles of references. It makes
few objects beside the many that it has imported, so Python's collector hardly ever looks at all of
them, and a device that carries 50 MiB a round would hold some 25 MiB more after each.
"""

from __future__ import annotations

import gc
import runpy
import sys
import threading
import time

# -P: nothing is imported from the folder in which somebody happens to be.
SPARINGLY = (sys.executable, "-P", "-m", "tesserafl.run.sparing")
"""In front of a program and its arguments."""
SECONDS = 5.0
"""Between two looks."""


def main() -> None:
    """Run the program as if it had been called by itself."""
    threading.Thread(target=_collect, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _collect() -> None:
    for _ in range(2):
        time.sleep(SECONDS)
    gc.collect()
    gc.freeze()  # what was imported stays, and a look at the rest takes a millisecond
    while True:
        gc.collect()
        time.sleep(SECONDS)


if __name__ == "__main__":
    main()
