"""What a device needs in memory for a round, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("one_order.py")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_round_takes_two_and_a_half_payloads_at_most(tmp_path):
    """Weights and gradients, or weights and their change; received parameters stay on the disk.

    The heap keeps some of what small pieces took, which does not grow with the model.
    """
    command = [sys.executable, str(SCRIPT), str(tmp_path), "fedavg", "192"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["payload"] > 192 << 20
    assert found["peak"] <= 2.5 * found["payload"], found
