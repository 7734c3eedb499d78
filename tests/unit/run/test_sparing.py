"""Another package's program, with its garbage collected while it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tesserafl.run.sparing import SPARINGLY

PROGRAM = """
import gc, sys, time, weakref

class Node: ...

def cycle():
    node = Node()
    node.itself = node
    return weakref.ref(node)

gc.disable()  # nobody else collects here
made = cycle()
for _ in range(600):
    if made() is None:
        print(*sys.argv[1:], __name__)
        sys.exit(3)
    time.sleep(0.05)
"""
QUICKLY = "from tesserafl.run import sparing; sparing.SECONDS = 0.05; sparing.main()"


def test_a_program_runs_as_by_itself_and_its_cycles_are_let_go(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    command = [sys.executable, "-c", QUICKLY, str(program), "--a", "b"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "--a b __main__\n"), done.stderr


def test_nothing_is_taken_from_the_folder_in_which_somebody_is(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("import random; print(random.random() < 1)")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/random.py").write_text("raise SystemExit(9)")
    done = subprocess.run(
        [*SPARINGLY, str(program)], cwd=tmp_path / "here", capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr
