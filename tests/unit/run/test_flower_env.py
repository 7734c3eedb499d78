"""The environment of Flower's processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tesserafl.run.flower_env import KEPT, SUPERLINK_FLAGS, environment


def test_flowers_variables_are_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("FLWR_LOG_LEVEL", "DEBUG")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:1")
    given = environment(tmp_path)
    assert {name: given[name] for name in given if name.startswith("FLWR_")} == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TRACING_ENABLED": "0",
        "FLWR_LOG_LEVEL": "DEBUG",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
        "FLWR_HOME": str(tmp_path),
    }
    assert given["HTTPS_PROXY"] == "http://proxy:1"


ASKED = """
from importlib import import_module
from flwr.supercore import telemetry, update_check
superlink = import_module("flwr.superlink.cli.flower_superlink")
supernode = import_module("flwr.supernode.cli.flower_supernode")
from flwr.supercore.utils import get_flwr_home
assert telemetry.FLWR_TELEMETRY_ENABLED == "0"
assert superlink._runtime_dependency_install_default() is False
flags = {flags!r}
assert superlink._parse_args_run_superlink().parse_args(flags).runtime_dependency_install is False
assert supernode._parse_args_run_supernode().parse_args([]).runtime_dependency_install is False
assert str(get_flwr_home()) == {home!r}
assert update_check.FLWR_DISABLE_UPDATE_CHECK == "FLWR_DISABLE_UPDATE_CHECK"
"""


PARTS = ("common", "supercore")
"""Where Flower reads its environment."""


def test_flower_reads_these_variables(tmp_path: Path) -> None:
    # A renamed variable would open again what is closed here, without a word.
    pytest.importorskip("flwr", reason="Flower is not installed (extra `flower`)")
    code = ASKED.format(flags=list(SUPERLINK_FLAGS), home=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    import flwr

    sources = Path(flwr.__file__).parent
    texts = [p.read_text("utf-8") for part in PARTS for p in (sources / part).rglob("*.py")]
    for name in (*KEPT, "FLWR_TRACING_ENABLED"):
        assert any(f'"{name}"' in text for text in texts), name
