"""One process at a time works in a run folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tesserafl.core.errors import CheckpointError
from tesserafl.run.files import alone_in

HOLD = """
import sys, time
from pathlib import Path
from tesserafl.run.files import alone_in
with alone_in(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(CheckpointError, match="another process works in"), alone_in(tmp_path):
            pass
        first.kill()  # as by kill -9: nothing of its own is run
        first.wait()
    with alone_in(tmp_path):
        pass


def test_what_was_half_written_goes(tmp_path: Path) -> None:
    torn = tmp_path / "checkpoints" / ".round-000001.json.123.tmp"
    torn.parent.mkdir()
    torn.write_bytes(b"{")
    (tmp_path / "config.json").write_text("{}")
    with alone_in(tmp_path):
        assert not torn.exists()
        assert (tmp_path / "config.json").exists()
